"""The checks that Optax runs on each of its own optimizers, on ours."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h

both = pytest.mark.parametrize("preset", h.PRESETS)


@both
def test_unknown_extra_arguments_are_ignored_and_nothing_recompiles(preset):
    problem = h.plain_problem()
    tx = h.make_tx(preset, problem)
    step = h.counted_jit(h.make_step(tx, problem))
    params, state = problem.params, h.initial_state(preset)
    unknown = {"value": jnp.float32(1.0), "nobody_knows_this": {"a": jnp.arange(3)}}
    params, state, first = step(params, state, **unknown)
    with h.Compilations() as compiled:
        params, state, second = step(params, state, **unknown)
        for _ in range(198):
            params, state, _ = step(params, state, **unknown)
    assert compiled.names == []
    assert step.traces == 1
    _, _, expected = h.reference_run(preset)
    h.assert_close(
        jax.tree.map(lambda *us: jnp.stack(us), first, second),
        jax.tree.map(lambda u: u[:2], expected),
    )


def test_the_compilation_counter_counts():
    double = jax.jit(lambda x: 2 * x)
    with h.Compilations() as compiled:
        double(np.float32(1))
        double(np.float32(2))
        double(np.ones(3, np.float32))
    assert len(compiled.names) == 2


@both
def test_map_params(preset):
    """`optax.tree.map_params` finds no parameter in our state, and those of its neighbours in a
    chain.
    """
    problem = h.plain_problem()
    tx = optax.chain(h.make_tx(preset, problem), optax.sgd(0.1, momentum=0.9))
    state = jax.jit(tx.init)(problem.params)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda p: p, state), state)

    specs = jax.tree.map(lambda p: f"spec {p.shape}", problem.params)
    marked = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "replicated"
    )
    ours, sgd = marked
    # ours is a prefix
    full = jax.tree.map(lambda mark, part: jax.tree.map(lambda _: mark, part), ours, state[0])
    assert jax.tree.structure(full) == jax.tree.structure(state[0])
    assert set(jax.tree.leaves(full)) == {"replicated"}
    assert optax.tree.get(sgd, "trace") == specs


# name -> (start, target, prediction from tapped layers); loss = sum (p - target)^2, all with known
# answer
PARABOLAS = {
    "vector": (
        jnp.zeros((1, 3)),
        jnp.array([[1.0, -2.0, 3.0]]),
        lambda w: h.dense(jnp.ones((1, 1)), w),
    ),
    "matrix": (
        jnp.zeros((2, 2)),
        jnp.array([[1.0, 2.0], [3.0, -4.0]]),
        lambda w: h.dense(jnp.eye(2), w),
    ),
    "mixed tuple": (  # a bare vector is the bias of the bare matrix
        (jnp.zeros(2), jnp.zeros((3, 2))),
        (jnp.array([1.0, -1.0]), jnp.array([[1.0, 2.0], [0.5, -4.0], [0.0, 1.0]])),
        lambda p: h.dense(jnp.concatenate([jnp.eye(3), jnp.zeros((1, 3))]), p[1], p[0]),
    ),
}


def _descend(preset, name, steps):
    start, target, outputs = PARABOLAS[name]
    estimator = ko.ggn(lambda p: ko.Normal(outputs(p)))
    rate = 0.05
    settings = {"damping": 1e-2, "kl_clip": 1e-2, "curvature_every": 5, "inverse_every": 10}
    tx = optax.chain(
        h.PRESETS[preset](estimator.layers(start), learning_rate=rate, **settings), optax.sgd(rate)
    )

    def loss(p):
        return sum(
            jnp.sum((a - b) ** 2)
            for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True)
        )

    @jax.jit
    def train(params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(
                jax.grad(loss)(params), state, params, curvature=estimator.at(params)
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), length=steps)[0][0]

    return train(start), target


@both
@pytest.mark.parametrize("name", PARABOLAS)
def test_converges_on_a_parabola(preset, name):
    chex.assert_trees_all_close(*_descend(preset, name, 1000), rtol=3e-2, atol=3e-2)


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", PARABOLAS)
def test_stays_converged_for_30000_steps(preset, name):
    chex.assert_trees_all_close(*_descend(preset, name, 30_000), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("preset", "number"), [("kfac", int), ("kfac_two_level", float)])
def test_inject_hyperparams_changes_nothing(preset, number):
    """Injected numbers arrive as traced arrays, periods included, and schedules as their values."""
    problem = h.plain_problem()
    schedule = optax.linear_schedule(0.1, 0.01, 5)
    settings = {"learning_rate": schedule, "damping": 0.05, "kl_clip": 1e-3, "decay": 0.9}
    settings["bound"] = "damped"  # the other one remembers its momentum beside the rest
    periods = {"curvature_every": number(2), "inverse_every": number(3)}
    tx = h.PRESETS[preset](problem.layers, **settings, curvature_every=2, inverse_every=3)
    factory = optax.inject_hyperparams(h.PRESETS[preset], static_args=("layers",))
    injected = factory(problem.layers, **settings, **periods)
    _, plain_state, plain_updates = h.run(tx, problem, 6)
    _, state, updates = h.run(injected, problem, 6)
    h.assert_close(updates, plain_updates)
    inner = state.inner_state
    if preset == "kfac_two_level":  # whose weights are checked, and remembered beside the rest
        inner = inner.inner
    h.assert_close(inner, plain_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(inner, plain_state)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], schedule(5), rtol=1e-6)


def test_an_injected_value_takes_effect_without_recompiling():
    problem = h.plain_problem()
    tx = optax.inject_hyperparams(ko.kfac)(
        problem.layers, learning_rate=0.1, damping=0.05, kl_clip=None
    )
    step = h.counted_jit(lambda *args: h.make_step(tx, problem)(*args, refresh=True))
    state = jax.jit(tx.init)(problem.params)
    _, _, small = step(problem.params, state)
    state.hyperparams["damping"] = jnp.float32(1e6)
    _, _, large = step(problem.params, state)
    assert step.traces == 1
    # under damping far above the curvature the update is gradient / damping
    h.assert_close(jax.tree.map(lambda u: 1e6 * u, large), h.plain_grads())
    assert optax.tree.norm(small) > 100 * optax.tree.norm(large)


def test_multi_steps():
    """The first mini-steps give zero; the inner update runs in all of them, and the last one's
    curvature counts.
    """
    problem, calls = h.plain_problem(), []
    inner = h.make_tx("kfac_two_level", problem, kl_clip=None)

    def counted(updates, state, params=None, **extra):
        jax.debug.callback(lambda: calls.append(1))
        return inner.update(updates, state, params, **extra)

    tx = optax.MultiSteps(
        optax.GradientTransformationExtraArgs(inner.init, counted), every_k_schedule=4
    )

    @jax.jit
    def step(state, grads, params):
        return tx.update(grads, state, problem.params, curvature=problem.at(params), refresh=True)

    @jax.jit
    def single(grads, params):
        return inner.update(
            grads, inner.init(params), params, curvature=problem.at(params), refresh=True
        )

    state = jax.jit(tx.init)(problem.params)
    grads = h.plain_grads()
    norms = []
    for i in range(8):
        params = h.plain_params(seed=i)
        updates, state = step(state, grads, params)
        norms.append(float(optax.tree.norm(updates)))
        if i == 3:
            jax.effects_barrier()
            assert len(calls) == 4, "documented: full cost in every mini-step"
            expected, alone = single(grads, params)
            h.assert_close(updates, expected)
            h.assert_close(optax.tree.get(state, "factors"), optax.tree.get(alone, "factors"))
    assert [norm > 0 for norm in norms] == [False] * 3 + [True] + [False] * 3 + [True]
    assert int(optax.tree.get(state, "kfac_count")) == 2
    assert int(optax.tree.get(state, "curvature_count")) == 2


def _typed_problem(dtype):
    return h.make_problem(h.plain_predict, h.plain_params(dtype=dtype), *h.data(dtype=dtype))


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_state_is_stable_under_cond(preset, dtype):
    """Structure, shapes, dtypes and weak types of the state never change, so it can be the result
    of a branch.
    """
    with jax.enable_x64(dtype == "float64"):
        problem = _typed_problem(jnp.dtype(dtype))
        tx = h.make_tx(preset, problem)
        params, grads = problem.params, problem.params
        init = jax.eval_shape(tx.init, params)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(init))

        def branch(flag, state):
            def update(state):
                return tx.update(grads, state, params, curvature=problem.at(params))

            updates, first = jax.lax.cond(flag, update, lambda state: (grads, state), state)
            return updates, jax.lax.cond(flag, lambda: first, lambda: update(first)[1])

        updates, after = jax.eval_shape(branch, jnp.bool_(True), init)
    h.assert_same_types(after, init)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


def test_concrete_states_keep_their_types():
    """As above for arrays that exist, from an init that is not compiled."""
    problem = h.plain_problem()
    tx = h.make_tx("kfac_two_level", problem)
    state = tx.init(problem.params)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    h.assert_same_types(h.initial_state("kfac_two_level"), state)
    step = jax.jit(h.make_step(tx, problem), static_argnames=("refresh", "curvature"))
    for extra in ({}, {"curvature": None, "refresh": False}):
        _, after, _ = step(problem.params, state, **extra)
        h.assert_same_types(after, state)


def test_a_constant_schedule_is_the_constant():
    problem = h.plain_problem()
    settings = {"learning_rate": 0.1, "damping": 0.05, "kl_clip": 1e-3, "decay": 0.95}
    constants = settings | {"curvature_every": 2, "inverse_every": 3}
    scheduled = h.make_tx(
        "kfac_two_level", problem, **{name: lambda _, v=v: v for name, v in constants.items()}
    )
    _, state, updates = h.run(scheduled, problem, 6)
    _, plain_state, plain_updates = h.reference_run("kfac_two_level")
    h.assert_close((updates, state), (plain_updates, plain_state))


def test_schedules_see_the_step_count():
    """Damping and KL-clip of the fifth step are those of count 4."""
    problem = h.plain_problem()
    schedules = {
        "damping": lambda count: 0.01 * (1 + count),
        "kl_clip": lambda count: 1e-6 * (1 + count) ** 2,
    }
    tx = h.make_tx("kfac", problem, **schedules)
    step = jax.jit(lambda *args: h.make_step(tx, problem)(*args, curvature=None, refresh=False))
    state = jax.jit(tx.init)(problem.params)
    scales = []
    for _ in range(5):
        _, state, _ = step(problem.params, state)
        scales.append(
            float(optax.tree.get(state, "kl_scale"))
            * np.sqrt(1 / (1 + optax.tree.get(state, "damping")))
        )
    np.testing.assert_allclose(optax.tree.get(state, "damping"), 0.05, rtol=1e-6)
    # same gradient and unit curvature: the squared Fisher norm of a step goes as 1 / (1 + damping)
    np.testing.assert_allclose(scales, scales[0] * np.arange(1, 6), rtol=1e-5)
