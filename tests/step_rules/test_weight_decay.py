"""Three ways to decay weights, against Optax, dense matrices and the theorem on homogeneous
networks.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import oracles

DECAY = 0.3
MODES = ("loss", "decoupled", "fisher")


def problem(sizes=(3, 4, 2), examples=6, bias=True, activation=jnp.tanh):
    params, x = oracles.make_params(0, sizes, bias), oracles.normal(1, (examples, sizes[0]))
    predict = lambda p, x: ko.Categorical(oracles.forward(p, x, activation=activation)[0])
    return ko.ggn(predict), params, x


def dense_fisher(estimator, params, x):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = jax.vmap(
        lambda v: jax.flatten_util.ravel_pytree(estimator.vector_product(params, unravel(v), x))[0]
    )
    return np.asarray(jax.jit(product)(jnp.eye(flat.size)))


def solve_with(matrix):
    """A preconditioner that is a dense inverse."""

    def apply(updates, _):
        flat, unravel = jax.flatten_util.ravel_pytree(updates)
        return unravel(jnp.linalg.solve(matrix, flat))

    return optax.stateless(apply)


def ravel(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def once(tx, params, **extra):
    grads = jax.tree.map(jnp.cos, params)
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **extra)[0])(grads, params)


@pytest.mark.parametrize(
    "mask",
    [None, lambda p: jax.tree.map(lambda x: x.ndim > 1, p), {"layer0": True, "layer1": False}],
)
def test_positions_of_the_decay_of_optax(x64, mask):
    _, params, _ = problem()
    inner, decay = optax.scale_by_sign(), optax.add_decayed_weights(DECAY, mask)
    for mode, chain in (
        ("decoupled", optax.chain(inner, decay)),
        ("loss", optax.chain(decay, inner)),
    ):
        updates = once(ko.add_weight_decay(inner, DECAY, mode=mode, mask=mask), params)
        np.testing.assert_array_equal(ravel(updates), ravel(once(chain, params)))


def test_scalar_preconditioners_do_not_tell_loss_and_decoupled_apart(x64):
    """With `P = s I` the decay before it is `1/s` times that behind it; for `s = 1` they are the
    same.
    """
    _, params, _ = problem()
    for scale in (1.0, 4.0):
        loss = once(ko.add_weight_decay(optax.scale(scale), DECAY), params)
        behind = once(
            ko.add_weight_decay(optax.scale(scale), scale * DECAY, mode="decoupled"), params
        )
        np.testing.assert_allclose(ravel(loss), ravel(behind), rtol=1e-12)
    adam = [
        once(ko.add_weight_decay(optax.scale_by_adam(), DECAY, mode=mode), params)
        for mode in MODES[:2]
    ]
    assert np.abs(ravel(adam[0]) - ravel(adam[1])).max() > 0.1


def test_every_mode_is_its_formula(x64):
    estimator, params, x = problem()
    fisher, damping = dense_fisher(estimator, params, x), 0.1
    inverse = np.linalg.inv(fisher + damping * np.eye(len(fisher)))
    theta, gradient = ravel(params), ravel(jax.tree.map(jnp.cos, params))
    expected = {
        "loss": inverse @ (gradient + DECAY * theta),
        "decoupled": inverse @ gradient + DECAY * theta,
        "fisher": inverse @ (gradient + DECAY * fisher @ theta),
    }
    for mode in MODES:
        tx = ko.add_weight_decay(
            solve_with(fisher + damping * np.eye(len(fisher))), DECAY, mode=mode
        )
        updates = ravel(once(tx, params, curvature=estimator.at(params, x)))
        np.testing.assert_allclose(updates, expected[mode], rtol=1e-10, atol=1e-12)
    # decoupled decay is the penalty in the metric of the damped preconditioner: Fisher norm plus a
    # part of the usual one
    both = inverse @ (gradient + DECAY * (fisher @ theta + damping * theta))
    np.testing.assert_allclose(expected["decoupled"], both, rtol=1e-10, atol=1e-12)


def test_fisher_decay_tends_to_decoupled_decay_without_damping(x64):
    """Where `F` is regular. The difference is `w damping P theta`, so it falls with the damping."""
    weights, x = oracles.normal(0, (2, 2)), oracles.normal(1, (8, 2))
    estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    fisher = dense_fisher(estimator, weights, x)
    gaps = []

    @jax.jit
    def both(damping):
        tx = solve_with(fisher + damping * np.eye(4))
        pair = [ko.add_weight_decay(tx, DECAY, mode=mode) for mode in ("fisher", "decoupled")]
        extra = {"curvature": estimator.at(weights, x)}
        return [t.update(jnp.cos(weights), t.init(weights), weights, **extra)[0] for t in pair]

    for damping in (1e-3, 1e-6, 1e-9):
        one, two = map(ravel, both(damping))
        gaps.append(np.abs(one - two).max())
        rest = DECAY * damping * np.linalg.solve(fisher + damping * np.eye(4), ravel(weights))
        np.testing.assert_allclose(two - one, rest, rtol=1e-4, atol=1e-12)
    assert gaps[2] < 1e-8
    assert gaps[0] > 1e2 * gaps[1] > 1e4 * gaps[2]


def test_directions_the_outputs_do_not_depend_on_are_not_decayed(x64):
    estimator, params, x = problem()
    x = x.at[:, 0].set(0.0)  # no example uses the first input
    natural = solve_with(dense_fisher(estimator, params, x) + 1e-2 * np.eye(len(ravel(params))))
    zero = jax.tree.map(jnp.zeros_like, params)
    unused = {}
    for mode in MODES:
        tx = ko.add_weight_decay(natural, DECAY, mode=mode)
        extra = {"curvature": estimator.at(params, x)}
        updates = jax.jit(lambda g, p: tx.update(g, tx.init(p), p, **extra)[0])(zero, params)
        unused[mode] = updates["layer0"]["kernel"][0]
    theta = params["layer0"]["kernel"][0]
    np.testing.assert_allclose(unused["fisher"], 0, atol=1e-14)
    np.testing.assert_allclose(unused["decoupled"], DECAY * theta, rtol=1e-10)
    np.testing.assert_allclose(unused["loss"], DECAY * theta / 1e-2, rtol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_fisher_norm_of_a_homogeneous_network_penalises_outputs(x64, depth):
    """Without biases and with ReLU, `J theta = L f`: hence `theta^T F theta = L^2 E[f^T H f]`."""
    estimator, params, x = problem((3, *(5,) * (depth - 1), 2), bias=False, activation=jax.nn.relu)
    f = oracles.forward(params, x, activation=jax.nn.relu)[0]
    y = jax.nn.softmax(f)
    penalised = jnp.mean(jnp.sum(y * f**2, -1) - jnp.sum(y * f, -1) ** 2)  # f^T (diag y - y y^T) f
    product = estimator.at(params, x).vector_product(params)
    norm = sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(params), jax.tree.leaves(product)))
    np.testing.assert_allclose(norm, depth**2 * penalised, rtol=1e-10)


def test_fisher_penalty_of_masked_parameters(x64):
    """`(w/2) (M theta)^T F (M theta)` has gradient `w M F M theta`; under `optax.masked` too."""
    estimator, params, x = problem()
    mask = {"layer0": False, "layer1": True}
    kept = ravel(
        {"layer0": jax.tree.map(jnp.zeros_like, params["layer0"]), "layer1": params["layer1"]}
    )
    wanted = ravel(jax.tree.map(jnp.cos, params)) + DECAY * (kept != 0) * (
        dense_fisher(estimator, params, x) @ kept
    )
    plain = ko.add_weight_decay(optax.identity(), DECAY, mode="fisher", mask=mask)
    outer = optax.masked(ko.add_weight_decay(optax.identity(), DECAY, mode="fisher"), mask)
    for tx in (plain, outer):
        np.testing.assert_allclose(
            ravel(once(tx, params, curvature=estimator.at(params, x))), wanted, rtol=1e-10
        )


def test_a_batch_split_over_devices_gives_one_fisher(x64):
    estimator, params, x = problem()
    zero = jax.tree.map(jnp.zeros_like, params)

    def decay(x, axis_name=None):
        tx = ko.add_weight_decay(optax.identity(), DECAY, mode="fisher", axis_name=axis_name)
        return tx.update(zero, tx.init(params), params, curvature=estimator.at(params, x))[0]

    split = jax.jit(jax.vmap(lambda x: decay(x, "devices"), axis_name="devices"))(
        x.reshape(2, 3, 3)
    )
    whole = jax.jit(decay)(x)
    for one, other in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, [other, other], rtol=1e-12, atol=1e-15)


def recorder():
    """Passes gradients and keeps the extra arguments it got."""
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update), seen


def test_loss_mode_shows_the_whole_objective_to_what_runs_inside(x64):
    params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    mask = {"w": True, "b": False}

    def value_fn(p, *, batch):
        return jnp.sum(p["w"]) * batch + p["b"][0]

    inner, seen = recorder()
    tx = ko.add_weight_decay(inner, 0.5, mask=mask)
    grads = jax.grad(value_fn)(params, batch=2.0)
    value = value_fn(params, batch=2.0)
    extra = {"grad": grads, "value": value, "value_fn": value_fn, "batch": 2.0}
    updates, _ = tx.update(grads, tx.init(params), params, **extra)
    objective = lambda p: value_fn(p, batch=2.0) + 0.25 * jnp.sum(p["w"] ** 2)
    np.testing.assert_allclose(ravel(updates), ravel(jax.grad(objective)(params)), rtol=1e-12)
    np.testing.assert_allclose(ravel(seen["grad"]), ravel(updates), rtol=1e-12)
    np.testing.assert_allclose(seen["value"], objective(params), rtol=1e-12)
    other = jax.tree.map(lambda p: 2 * p, params)
    np.testing.assert_allclose(seen["value_fn"](other, batch=2.0), objective(other), rtol=1e-12)
    assert "batch" in inspect.signature(seen["value_fn"]).parameters
    assert seen["batch"] == 2.0

    for mode, named in (("decoupled", grads), ("fisher", None)):
        inner, seen = recorder()
        tx = ko.add_weight_decay(inner, 0.5, mode=mode)
        curvature = ko.ggn(lambda p: ko.Normal(p["w"][None] * p["b"])).at(params)
        updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature, **extra)
        np.testing.assert_array_equal(
            ravel(seen["grad"]), ravel(updates if named is None else named)
        )
        assert seen["value"] == value
        assert seen["value_fn"] is value_fn


def test_a_line_search_inside_decreases_the_whole_objective(x64):
    """Backtracking gets `value`, `grad` and `value_fn` of one and the same function."""
    start = {"w": jnp.array([3.0, -2.0])}
    value_fn = lambda p: jnp.sum(jnp.cosh(p["w"]))
    objective = lambda p: value_fn(p) + 0.5 * DECAY * jnp.sum(p["w"] ** 2)
    search = optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    )
    tx = ko.add_weight_decay(search, DECAY)
    value, grads = jax.value_and_grad(value_fn)(start)
    updates, state = tx.update(
        grads, tx.init(start), start, value=value, grad=grads, value_fn=value_fn
    )
    new = optax.apply_updates(start, updates)
    np.testing.assert_allclose(optax.tree.get(state, "value"), objective(new), rtol=1e-12)
    assert objective(new) < objective(start)


def test_schedules_and_injected_numbers_under_scan():
    params = {"w": jnp.full((2, 2), 0.3, jnp.bfloat16), "b": jnp.ones(2)}
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    plain = ko.add_weight_decay(optax.identity(), schedule)
    injected = optax.inject_hyperparams(
        ko.add_weight_decay, static_args=("preconditioner", "mode", "mask")
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    for tx in (plain, injected(optax.identity(), weight_decay=schedule, mode="loss")):
        step = lambda state, _: tx.update(zero, state, params)[::-1]
        _, updates = jax.lax.scan(step, tx.init(params), length=3)
        np.testing.assert_allclose(updates["b"][:, 0], [1, 0.75, 0.5], rtol=1e-6)
        assert updates["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("mode", MODES)
def test_missing_arguments_are_errors(mode):
    tx, params = ko.add_weight_decay(optax.identity(), 0.1, mode=mode), jnp.ones(2)
    with pytest.raises(ValueError, match=r"add_weight_decay.update got no `params`; expected"):
        tx.update(params, tx.init(params))
    if mode == "fisher":
        with pytest.raises(
            ValueError, match=r"no `curvature`, which mode=\"fisher\" needs in every step"
        ):
            tx.update(params, tx.init(params), params, curvature=None)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="weight_decay=-1; expected weight_decay >= 0"):
        ko.add_weight_decay(optax.identity(), -1)
    with pytest.raises(
        ValueError, match="mode='l2'; expected one of 'loss', 'decoupled', 'fisher'"
    ):
        ko.add_weight_decay(optax.identity(), 0.1, mode="l2")
