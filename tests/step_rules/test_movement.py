"""Movements of `bound_movement` against dense matrices, momentum included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.methods.kfac.fixed import _with_momentum
from kfac_optax.step_rules.directions import kept_finite
from kfac_optax.step_rules.movement import MovementState
from tests import helpers as h
from tests import oracles
from tests.step_rules.test_bound import MOMENTUM, dense_fisher, gradient, problem

RATES = optax.piecewise_constant_schedule(0.3, {2: 0.5})


@pytest.fixture(scope="module")
def moves():
    """Four steps of K-FAC under a bound: what moved, and what it should be made of."""
    with jax.enable_x64(True):
        _, params, x, _, estimator, layers = problem()
        inside = ko.kfac(layers, kl_clip=None, damping=0.05, inverse_every=1, curvature_every=1)

        def run(kl_clip, params=params, steps=4):
            bounded = ko.bound_movement(
                inside, learning_rate=RATES, kl_clip=kl_clip, momentum=MOMENTUM
            )
            tx = optax.chain(bounded, optax.sgd(RATES, momentum=MOMENTUM))

            @jax.jit
            def step(params, state, inner):
                grad, curvature = gradient(params, x), estimator.at(params, x)
                update, inner = inside.update(grad, inner, params, curvature=curvature)
                updates, state = tx.update(grad, state, params, curvature=curvature)
                return optax.apply_updates(params, updates), state, inner, update

            state, inner, rows = tx.init(params), inside.init(params), []
            for _ in range(steps):
                new, state, inner, update = step(params, state, inner)
                moved = oracles.flatten(new) - oracles.flatten(params)
                rows.append((moved, oracles.flatten(update), dense_fisher(params, x), state[0]))
                params = new
            return rows

        yield run


@pytest.mark.parametrize("kl_clip", [1e6, 1e-5])
def test_movements_are_those_of_dense_matrices(x64, moves, kl_clip):
    previous, last_rate = 0.0, float(RATES(0))
    for i, (moved, update, fisher, state) in enumerate(moves(kl_clip)):
        rate = float(RATES(i))
        # a lower rate shortens what momentum carries on, as in sgd
        whole = MOMENTUM * rate / last_rate * previous - rate * update
        norm = (1 - MOMENTUM) * np.sqrt(whole @ fisher @ whole)
        scale = min(1.0, np.sqrt(kl_clip) / norm)
        np.testing.assert_allclose(moved, scale * whole, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.movement_scale, scale, rtol=1e-9)
        np.testing.assert_allclose(state.movement_norm, norm, rtol=1e-9)
        assert (scale < 1) == (kl_clip < 1)
        previous, last_rate = moved, rate


def test_without_curvature_the_last_scale_is_used_again(x64):
    _, params, x, _, estimator, layers = problem()
    options = {"learning_rate": 0.5, "kl_clip": 1e-4, "momentum": 0.0}
    bounded = ko.kfac(layers, bound="movement", **options)
    alone = ko.kfac(layers, learning_rate=0.5, kl_clip=1e-4)
    grad, curvature = gradient(params, x), estimator.at(params, x)
    clipped, _ = alone.update(grad, alone.init(params), params, curvature=curvature)
    first, state = bounded.update(grad, bounded.init(params), params, curvature=curvature)
    scale = float(state.movement_scale)
    np.testing.assert_allclose(oracles.flatten(first), scale * oracles.flatten(clipped), rtol=1e-10)
    again, after = bounded.update(grad, state, params, curvature=None)
    np.testing.assert_allclose(oracles.flatten(again), oracles.flatten(first), rtol=1e-10)
    assert float(after.movement_scale) == scale
    assert ko.diagnostics(after)["movement_scale"] == scale
    with pytest.raises(ValueError, match="got no params"):
        bounded.update(grad, state, curvature=curvature)


def test_what_is_gathered_at_rate_zero_does_not_break_the_bound(x64):
    """A warm-up from zero, and a rate that is zero in between."""
    _, params, x, _, estimator, _ = problem()
    rates, kl_clip = jnp.asarray([0.0, 0.5, 0.5, 0.0, 0.0, 0.5]), 1e-5
    bounded = ko.bound_movement(
        optax.identity(), learning_rate=lambda i: rates[i], kl_clip=kl_clip, momentum=MOMENTUM
    )
    tx = optax.chain(bounded, optax.sgd(lambda i: rates[i], momentum=MOMENTUM))

    @jax.jit
    def step(params, state):
        grad, curvature = gradient(params, x), estimator.at(params, x)
        updates, state = tx.update(grad, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for rate in rates:
        new, state = step(params, state)
        moved = oracles.flatten(new) - oracles.flatten(params)
        square = (1 - MOMENTUM) ** 2 * moved @ dense_fisher(params, x) @ moved
        np.testing.assert_allclose(square, kl_clip if rate else 0, rtol=1e-9)
        params = new
    # no movement has no length: the scale of the last one counts on
    zero, curvature = jax.tree.map(jnp.zeros_like, params), estimator.at(params, x)
    still = state[0]._replace(previous_params=params)
    _, after = bounded.update(zero, still, params, curvature=curvature)
    assert 0 < float(after.movement_scale) == float(still.movement_scale) < 1


def test_an_update_of_any_length_has_the_bound(x64):
    _, params, x, _, estimator, _ = problem()
    params, x = jax.tree.map(lambda p: p.astype(jnp.float32), params), x.astype(jnp.float32)
    tx = ko.bound_movement(optax.identity(), learning_rate=1.0, kl_clip=1e-4, momentum=0.0)
    grad, fisher = gradient(params, x), dense_fisher(params, x)

    @jax.jit
    def moved(factor):
        update = jax.tree.map(lambda g: factor * g, grad)
        return tx.update(update, tx.init(params), params, curvature=estimator.at(params, x))[0]

    # squares of the larger ones are beyond float32
    for factor in (1e3, 1e20, 1e30):
        move = oracles.flatten(moved(jnp.float32(factor)))
        np.testing.assert_allclose(move @ fisher @ move, 1e-4, rtol=1e-4)


@pytest.mark.parametrize("bound", ["exact", "movement"])
@pytest.mark.parametrize("words", [{"kl_clip": None}, {"learning_rate": 0.1, "balance": "apart"}])
def test_a_bound_that_would_not_be_taken_is_refused(bound, words):
    with pytest.raises(ValueError, match=f"got bound='{bound}', which has no effect beside"):
        ko.kfac_two_level(h.plain_problem().layers, bound=bound, **words)


@pytest.mark.parametrize(("given", "used", "ignored"), [(0.5, 0.5, 0), (1.0, 0.9, 1)])
def test_an_injected_momentum_of_one_has_no_bound(given, used, ignored):
    moving = functools.partial(ko.bound_movement, optax.identity(), learning_rate=1.0)
    tx = _with_momentum(moving, jnp.float32(given))
    params = jnp.ones(2)
    _, state = tx.update(params, tx.init(params), params, curvature=None)
    number = state.given["given_momentum"]
    assert (float(number.last_good), int(number.ignored_values)) == (np.float32(used), ignored)


@pytest.mark.parametrize(
    ("normalised", "words", "moving"),
    [
        ((), {}, True),
        ((0, 1), {}, False),
        ((0,), {}, True),  # one of three has less than half of the weights
        ((1,), {}, False),  # what is before it has none either
        ((), {"kl_clip": None}, False),
        ((), {"balance": "apart"}, False),
        ((), {"bound": "damped"}, False),
        ((0, 1), {"bound": "movement"}, True),
    ],
)
def test_the_network_decides_on_the_bound(normalised, words, moving):
    """A batch norm takes the scale of the weights before it; where most have none KL-clip is alone."""
    params = {name: jnp.ones((3, 3)) for name in "abc"}

    def predict(params, x):
        for i, w in enumerate(params.values()):
            x = x @ w
            if i in normalised:
                x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
        return ko.Normal(x)

    layers = ko.ggn(predict).layers(params, jnp.ones((5, 3)))
    for preset in (ko.kfac, ko.kfac_two_level):
        state = preset(layers, **({"learning_rate": 0.1} | words)).init(params)
        assert isinstance(state, MovementState) == moving


def test_momentum_counts_only_where_it_follows(x64):
    """Behind plain gradient descent the bound is one of the update alone, and nothing is taken back."""
    _, params, x, _, estimator, _ = problem()
    rate, kl_clip = 0.5, 1e-5
    bounded = ko.bound_movement(
        optax.identity(), learning_rate=rate, kl_clip=kl_clip, momentum=MOMENTUM
    )

    def states(behind):
        tx = optax.chain(bounded, behind)

        @jax.jit
        def step(params, state):
            grad, curvature = gradient(params, x), estimator.at(params, x)
            updates, state = tx.update(grad, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state, grad, updates

        at, state = params, tx.init(params)
        for _ in range(4):
            before = at
            at, state, grad, updates = step(at, state)
            yield before, state[0], oracles.flatten(grad), oracles.flatten(updates)

    *_, (_, state, _, _) = states(optax.sgd(rate, momentum=MOMENTUM))
    assert int(state.other_movements) == 0 and not ko.problems(state)
    # two steps that are no sum: from then on each is along its gradient, with the same bound
    for i, (at, state, grad, updates) in enumerate(states(optax.sgd(rate))):
        assert int(state.other_movements) == max(0, i - 1)
        if i != 1:
            counted = MOMENTUM if i == 0 else 0.0
            scale = np.sqrt(kl_clip / (1 - counted) ** 2 / (grad @ dense_fisher(at, x) @ grad))
            np.testing.assert_allclose(updates, -scale * grad, rtol=1e-9)
    assert "pass the momentum=" in ko.problems(state)[0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_short_movements_in_half_precision_have_the_bound(x64, dtype):
    """Entries whose squares a half does not have, of leaves that differ by orders of magnitude."""
    _, params, x, _, estimator, _ = problem()
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    half, x = jax.tree.map(lambda p: p.astype(dtype), params), x.astype(jnp.float32)
    sizes = jax.tree.unflatten(
        jax.tree.structure(params), 1e-3 * 0.5 ** np.arange(len(jax.tree.leaves(params)))
    )
    update = jax.tree.map(lambda g, size: (size * g).astype(dtype), gradient(params, x), sizes)
    tx = ko.bound_movement(optax.identity(), learning_rate=1.0, kl_clip=1e-9, momentum=0.0)

    def moved(params, x):
        widened = jax.tree.map(lambda g, p: g.astype(p.dtype), update, params)
        new, state = tx.update(widened, tx.init(params), params, curvature=estimator.at(params, x))
        return oracles.flatten(jax.tree.map(lambda u: u.astype(jnp.float32), new)), state

    wide, of_wide = moved(params, x)
    narrow, of_narrow = moved(half, x.astype(dtype))
    digits = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(narrow, wide, rtol=8 * digits, atol=1e-7)
    np.testing.assert_allclose(of_narrow.movement_scale, of_wide.movement_scale, rtol=4 * digits)
    assert float(of_wide.movement_scale) < 0.5


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_update_that_is_not_finite_is_seen_but_at_rate_zero(x64, bad):
    _, params, x, _, estimator, _ = problem()
    params, x = jax.tree.map(lambda p: p.astype(jnp.float32), params), x.astype(jnp.float32)
    rates = jnp.asarray([0.5, 0.0])
    tx = ko.bound_movement(
        optax.identity(), learning_rate=lambda i: rates[i], kl_clip=1e-3, momentum=MOMENTUM
    )
    grad = gradient(params, x)
    broken = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(bad), grad)
    state = tx.init(params)
    for seen in (True, False):
        new, state = tx.update(broken, state, params, curvature=estimator.at(params, x))
        finite = [bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(new)]
        assert all(finite) != seen
        assert float(state.movement_scale) == 1.0


def test_parameters_are_kept_but_for_what_is_not_finite():
    """Exactly where a step is short; elsewhere to a rounding of the step."""
    random = np.random.default_rng(0)
    before = jnp.asarray(random.normal(size=1000), jnp.float32)
    near = before * jnp.asarray(random.uniform(0.5, 2.0, 1000), jnp.float32)
    far = jnp.asarray(random.normal(size=1000), jnp.float32)
    np.testing.assert_array_equal(kept_finite(near, before), near)
    error = np.abs(np.asarray(kept_finite(far, before), float) - np.asarray(far, float))
    assert (error <= 2.0**-23 * np.abs(far - before)).all()
    np.testing.assert_array_equal(kept_finite(far, jnp.zeros(1000)), far)
    broken = jnp.array([jnp.nan, jnp.inf, 3.0])
    np.testing.assert_array_equal(kept_finite(broken, jnp.array([1.0, 2.0, 2.5])), [1.0, 2.0, 3.0])
