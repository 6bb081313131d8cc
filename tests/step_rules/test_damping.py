"""Levenberg-Marquardt damping: the reduction ratio, rejected steps, the search for the
preconditioner's damping.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.step_rules.damping_search import lowest
from tests import helpers, oracles


class Problem:
    """A model, its curvature and its objective; linear with a Gaussian likelihood the objective is
    quadratic.
    """

    def __init__(self, *, linear=True, penalty=0.0, likelihood=ko.Normal):
        sizes = (3, 2) if linear else (3, 4, 2)
        self.params = oracles.make_params(0, sizes)
        self.x, self.y = oracles.normal(1, (8, 3)), oracles.normal(2, (8, 2))
        self.penalty = penalty

        def predict(params, x):
            return likelihood(oracles.forward(params, x)[0])

        self.predict = predict
        self.fisher = ko.ggn(predict)
        self.layers = self.fisher.layers(self.params, self.x)

    def loss(self, params):
        decay = sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
        return self.predict(params, self.x).mean_nll(self.y) + self.penalty / 2 * decay

    def chain(self, **options):
        return optax.chain(ko.kfac(self.layers, kl_clip=None), ko.quadratic_step(**options))

    def step(self, tx, value_fn=None):
        value_fn = self.loss if value_fn is None else value_fn

        @functools.partial(helpers.counted_jit, static_argnames="adapt")
        def step(params, state, adapt=None):
            value, grads = jax.value_and_grad(self.loss)(params)
            updates, state = tx.update(
                grads,
                state,
                params,
                curvature=self.fisher.at(params, self.x),
                value=value,
                value_fn=value_fn,
                adapt=adapt,
            )
            return optax.apply_updates(params, updates), state

        return step


@pytest.fixture
def quadratic(x64):
    return Problem()


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_on_a_quadratic_the_ratio_is_one_and_the_damping_shrinks_by_the_factor(x64, penalty):
    problem = Problem(penalty=penalty)
    tx = ko.adapt_damping(
        problem.chain(weight_decay=penalty),
        initial_damping=2.0,
        every=3,
        decay=0.9,
        weight_decay=penalty,
    )
    step, params, state = problem.step(tx), problem.params, tx.init(problem.params)
    for count in range(1, 7):
        params, state = step(params, state)
        np.testing.assert_allclose(state.model_damping, 2.0 * 0.9 ** (3 * (count // 3)), rtol=1e-12)
        np.testing.assert_allclose(
            state.preconditioner_damping, state.model_damping + penalty, rtol=1e-12
        )
        if count % 3 == 0:
            assert abs(float(state.reduction_ratio) - 1) < 1e-10
    assert int(state.rejected_steps) == 0


def test_a_penalty_that_the_model_does_not_know_shows_in_the_ratio(x64):
    problem = Problem(penalty=0.7)
    tx = ko.adapt_damping(problem.chain(), initial_damping=1e-6, every=1)
    _, state = problem.step(tx)(problem.params, tx.init(problem.params))
    assert float(state.reduction_ratio) < 0.99


def test_with_the_damping_in_the_model_the_ratio_is_above_one(quadratic):
    tx = ko.adapt_damping(quadratic.chain(), initial_damping=1.0, every=1, include_damping=True)
    _, state = quadratic.step(tx)(quadratic.params, tx.init(quadratic.params))
    inner = state.optimizer[1]
    np.testing.assert_allclose(
        state.reduction_ratio, inner.model_change / inner.damped_change, rtol=1e-10
    )
    assert float(state.reduction_ratio) > 1.01


def test_over_an_optimizer_without_quadratic_step_the_ratio_is_the_same(quadratic):
    """Heavy ball at fixed rate and momentum, by `quadratic_step` or by Optax."""
    ours = quadratic.chain(learning_rate=0.5, momentum=0.9)
    theirs = optax.chain(ko.kfac(quadratic.layers, kl_clip=None), optax.sgd(0.5, momentum=0.9))
    states = []
    for optimizer in (ours, theirs):
        tx = ko.adapt_damping(optimizer, every=1, initial_damping=3.0)
        step, params, state = quadratic.step(tx), quadratic.params, tx.init(quadratic.params)
        for _ in range(3):
            params, state = step(params, state)
        states.append((params, state.model_damping, state.reduction_ratio))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), *states)


@pytest.mark.parametrize("factor", [-1.0, np.nan])
def test_a_rejected_step_leaves_parameters_and_momentum_untouched(quadratic, factor):
    tx = ko.adapt_damping(quadratic.chain(), initial_damping=1.0, every=1)
    good = quadratic.step(tx)
    # an objective that rises by what the model says it falls
    worse = quadratic.step(
        tx, lambda p: quadratic.loss(quadratic.params) + factor * (quadratic.loss(p) - 5.0)
    )
    params, state = good(quadratic.params, tx.init(quadratic.params))
    after, new = worse(params, state)
    assert_trees_equal(after, params)
    assert_trees_equal(new.optimizer[1], state.optimizer[1])
    assert int(new.rejected_steps) == 1
    np.testing.assert_allclose(new.model_damping, state.model_damping / 0.95, rtol=1e-12)
    # the curvature that was measured stays
    curvature = lambda s: s.optimizer[0].preconditioner
    assert int(curvature(new).kfac_count) == int(curvature(state).kfac_count) + 1


@pytest.mark.parametrize(("every", "decay"), [(1, 0.95), (5, 0.9), (20, 1.0)])
def test_rejections_in_a_row_raise_the_damping_ever_faster(quadratic, every, decay):
    """By `omega^-1`, `omega^-2`, ...; a step that is taken begins the row anew."""
    options = {"initial_damping": 1.0, "every": every, "decay": decay, "reject_below": 0.0}
    tx = ko.adapt_damping(quadratic.chain(), **options)
    good, worse = quadratic.step(tx), quadratic.step(tx, lambda p: 100 + quadratic.loss(p))
    params, state, expected = quadratic.params, tx.init(quadratic.params), 1.0
    for row in (1, 2, 3):
        params, state = worse(params, state, adapt=True)
        expected *= decay ** (-every * row)
        assert int(state.rejected_in_a_row) == row
        np.testing.assert_allclose(state.model_damping, expected, rtol=1e-12)
    params, state = good(params, state, adapt=False)
    before = float(state.model_damping)
    assert int(state.rejected_in_a_row) == 0
    _, state = worse(params, state, adapt=True)
    np.testing.assert_allclose(state.model_damping, before * decay**-every, rtol=1e-12)


def test_steps_in_between_are_not_measured(quadratic):
    tx = ko.adapt_damping(quadratic.chain(), every=2)
    good = quadratic.step(tx)
    worse = quadratic.step(tx, lambda p: quadratic.loss(p) * jnp.nan)
    params, state = quadratic.params, tx.init(quadratic.params)
    for _ in range(2):
        params, state = good(params, state)
    known = float(state.reduction_ratio)
    params, state = worse(params, state)
    assert int(state.rejected_steps) == 0 and float(state.reduction_ratio) == known
    after, state = worse(params, state)
    assert int(state.rejected_steps) == 1
    assert_trees_equal(after, params)


@pytest.mark.parametrize("adapt", [None, False])
def test_every_step_of_the_first_period_is_measured(quadratic, adapt):
    """One that raises the objective is taken back; a good one does not lower the damping before
    its turn.
    """
    tx = ko.adapt_damping(quadratic.chain(), initial_damping=1.0, every=3)
    good, worse = quadratic.step(tx), quadratic.step(tx, lambda p: quadratic.loss(p) + 100)
    params, state = good(quadratic.params, tx.init(quadratic.params), adapt=adapt)
    np.testing.assert_allclose(state.reduction_ratio, 1, rtol=1e-10)
    assert float(state.model_damping) == 1
    after, state = worse(params, state, adapt=adapt)
    assert_trees_equal(after, params)
    assert int(state.rejected_steps) == 1
    np.testing.assert_allclose(state.model_damping, 0.95**-3, rtol=1e-12)


def test_static_and_traced_schedules_agree(quadratic):
    tx = ko.adapt_damping(quadratic.chain(), every=2)
    step, runs = quadratic.step(tx), []
    for static in (True, False):
        params, state = quadratic.params, tx.init(quadratic.params)
        for count in range(4):
            params, state = step(params, state, adapt=count % 2 == 1 if static else None)
        runs.append((params, state))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), *runs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Concave:
    """A wrong likelihood: its output Hessian is negative."""

    right: ko.Normal

    natural = property(lambda self: self.right.natural)
    batch_shape = property(lambda self: self.right.batch_shape)
    num_columns = property(lambda self: self.right.num_columns)
    weights = property(lambda self: self.right.weights)

    def with_natural(self, natural):
        return Concave(self.right.with_natural(natural))

    def hessian_product(self, v):
        return jax.tree.map(jnp.negative, self.right.hessian_product(v))

    def __getattr__(self, name):
        if name in ("nll", "mean_nll", "sample", "fisher_sqrt_column"):
            return getattr(self.right, name)
        raise AttributeError(name)


def test_negative_curvature_is_named_and_the_damping_grows(x64):
    problem = Problem(likelihood=lambda mean: Concave(ko.Normal(mean)))
    tx = ko.adapt_damping(problem.chain(), initial_damping=1e-3, every=5)
    step, params, state = problem.step(tx), problem.params, tx.init(problem.params)
    after, state = step(params, state)
    assert_trees_equal(after, params)
    assert int(state.optimizer[1].negative_curvatures) == 1
    np.testing.assert_allclose(state.model_damping, 1e-3 / 0.95**5, rtol=1e-12)
    assert any("negative curvature" in text for text in ko.problems(state))


def test_the_damping_grows_until_a_step_is_found_again(x64):
    """Without any damping that helps the run lives on: parameters stay finite, the bound is named."""
    problem = Problem(linear=False)
    tx = ko.adapt_damping(problem.chain(), initial_damping=1.0, every=1, damping_max=1.5)
    step = problem.step(tx, lambda p: jnp.inf)
    params, state = problem.params, tx.init(problem.params)
    for _ in range(10):
        params, state = step(params, state)
    assert_trees_equal(params, problem.params)
    assert float(state.model_damping) == 1.5 and int(state.damping_at_bound) >= 1
    text = "\n".join(ko.problems(state))
    assert "rejected" in text and "damping" in text and "bound" in text
    after, state = problem.step(tx)(params, state)
    assert np.isfinite(float(problem.loss(after))) and float(problem.loss(after)) < float(
        problem.loss(params)
    )


def test_the_search_takes_the_damping_with_the_lowest_model(quadratic):
    # the model contains no damping: the smallest candidate is the best
    tx = ko.adapt_damping(
        quadratic.chain(),
        initial_damping=1e-9,
        damping_min=1e-9,
        every=100,
        search_every=2,
        search_decay=0.5,
    )
    step, params, state = quadratic.step(tx), quadratic.params, tx.init(quadratic.params)
    state = state._replace(preconditioner_damping=jnp.asarray(4.0))
    params, state = step(params, state)
    assert float(state.preconditioner_damping) == 4.0

    @jax.jit
    def change(params, inner, gamma):
        grads = jax.grad(quadratic.loss)(params)
        _, inner = quadratic.chain().update(
            grads,
            inner,
            params,
            curvature=quadratic.fisher.at(params, quadratic.x),
            grad=grads,
            damping=gamma,
            model_damping=1e-9,
        )
        return inner[1].damped_change

    changes = [float(change(params, state.optimizer, gamma)) for gamma in (2.0, 4.0, 8.0)]
    _, state = step(params, state)
    assert float(state.preconditioner_damping) == (2.0, 4.0, 8.0)[int(np.argmin(changes))] == 2.0
    np.testing.assert_allclose(state.optimizer[1].damped_change, min(changes), rtol=1e-12)


def test_both_levels_get_the_adapted_damping(x64):
    problem = Problem(linear=False)
    optimizer = optax.chain(ko.kfac_two_level(problem.layers, kl_clip=None), ko.quadratic_step())
    tx = ko.adapt_damping(optimizer, initial_damping=0.3, every=1)
    plain = ko.kfac_two_level(problem.layers, kl_clip=None, damping=0.3)

    @jax.jit
    def both(params):
        value, grads = jax.value_and_grad(problem.loss)(params)
        at = problem.fisher.at(params, problem.x)
        _, state = tx.update(
            grads, tx.init(params), params, curvature=at, value=value, value_fn=problem.loss
        )
        return state, *plain.update(grads, plain.init(params), params, curvature=at)

    state, direction, inner = both(problem.params)
    taken = jax.tree.map(lambda u, s: s / -u, direction, state.optimizer[1].previous_update)
    ratios = np.concatenate([np.ravel(x) for x in jax.tree.leaves(taken)])
    np.testing.assert_allclose(ratios, state.optimizer[1].step_rate, rtol=1e-9)
    assert float(inner.preconditioner.coarse_share) > 0


def test_missing_arguments_are_named(quadratic):
    tx = ko.adapt_damping(quadratic.chain())
    state, grads = tx.init(quadratic.params), quadratic.params
    at = quadratic.fisher.at(quadratic.params, quadratic.x)
    with pytest.raises(
        ValueError,
        match=r"adapt_damping.update: got no value, value_fn; .*value_fn=lambda p: loss_fn",
    ):
        tx.update(grads, state, quadratic.params, curvature=at)
    with pytest.raises(ValueError, match=r"got no value_fn"):
        tx.update(grads, state, quadratic.params, curvature=at, value=1.0)
    with pytest.raises(ValueError, match=r"needs it in every step"):
        tx.update(
            grads, state, quadratic.params, curvature=None, value=1.0, value_fn=quadratic.loss
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_damping": 0.0}, "initial_damping=0.0; expected initial_damping > 0"),
        ({"every": 0}, "every=0"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"lower": 0.9, "upper": 0.5}, "upper=0.5"),
        ({"damping_min": 1.0, "damping_max": 0.1}, "damping_max=0.1"),
        ({"search_every": 0}, "search_every=0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=f"adapt_damping: {message}"):
        ko.adapt_damping(optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([-1.0, -3.0, -2.0], 1),
        ([-1.0, -1.0, -1.0], 0),  # what is no better changes nothing
        ([-1.0, jnp.nan, -2.0], 2),
        ([jnp.nan, -1.0, -2.0], 0),  # nothing is below it: the damping stays
        ([jnp.inf, jnp.nan, -2.0], 2),
    ],
)
def test_the_candidate_with_the_lowest_model_change(changes, expected):
    assert int(lowest(jnp.array(changes))) == expected


def test_a_search_without_a_model_is_an_error(quadratic):
    tx = ko.adapt_damping(optax.sgd(0.1), search_every=1)
    with pytest.raises(ValueError, match="search_every needs quadratic_step"):
        quadratic.step(tx)(quadratic.params, tx.init(quadratic.params))


@pytest.mark.parametrize("preset", [ko.kfac_adaptive, ko.kfac_two_level_adaptive])
def test_presets_train_without_any_setting(x64, preset):
    problem = Problem(linear=False)
    tx = preset(problem.layers)
    step, params, state = problem.step(tx), problem.params, tx.init(problem.params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(30):
        params, state = step(params, state)
    assert step.traces == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == types
    adam = optax.adam(0.05)
    other, adam_state = problem.params, adam.init(problem.params)

    @jax.jit
    def adam_step(params, state):
        updates, state = adam.update(jax.grad(problem.loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(30):
        other, adam_state = adam_step(other, adam_state)
    assert float(problem.loss(params)) < float(problem.loss(other))
