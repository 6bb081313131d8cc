"""K-BFGS against its formulas, written out per example in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests import oracles

SIZES, RATE, LAM, DECAY = (3, 4, 2), 0.3, 0.25, 0.75
X, Y = oracles.normal(0, (6, 3)), oracles.normal(1, (6, 2))


def losses(params, x, y):
    return jnp.sum(jnp.square(oracles.forward(params, x)[0] - y), 1) / 2


ESTIMATOR = ko.empirical_fisher(losses)


def setup(make=ko.k_bfgs, **options):
    params = oracles.make_params(0, SIZES)
    words = dict(learning_rate=RATE, damping=LAM, decay=DECAY) | options
    return params, make(ESTIMATOR.layers(params, X, Y), **words)


def run(params, tx, count):
    """Parameters after every step, and the state."""

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: losses(p, X, Y).mean())(params)
        curvature = ESTIMATOR.at(params, X, Y)
        updates, state = tx.update(gradient, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state, out = jax.jit(tx.init)(params), []
    for _ in range(count):
        params, state = step(params, state)
        out.append(params)
    return out, state


def matrices(params):
    return [np.vstack([layer["kernel"], layer["bias"]]) for layer in params.values()]


def as_params(matrices, like):
    kernels = zip(like, matrices, strict=True)
    return {
        name: {"kernel": jnp.asarray(m[:-1]), "bias": jnp.asarray(m[-1])} for name, m in kernels
    }


def damped_twice(s, y, inverse, bound):
    moved = inverse @ y
    if s @ y < 0.2 * (y @ moved):
        theta = 0.8 * (y @ moved) / (y @ moved - s @ y)
        s = theta * s + (1 - theta) * moved
    if s @ y < bound * (s @ s):
        theta = (1 - bound) * (s @ s) / (s @ s - s @ y)
        y = theta * y + (1 - theta) * s
    return s, y


def bfgs(inverse, s, y):
    left = np.eye(len(s)) - np.outer(s, y) / (s @ y)
    return left @ inverse @ left.T + np.outer(s, s) / (s @ y)


def by_hand(params, steps):
    """Everything as the paper has it, layer by layer."""
    layers, out = None, []
    for k in range(steps):
        w = matrices(params)
        residual = oracles.forward(params, X, tapped=False)[0] - Y
        a, g = oracles.per_example(params, X.astype(float), residual[None])
        gradients = [ai.T @ gi[0] / len(X) for ai, gi in zip(a, g)]
        e = min(1 - 1 / (k + 1), DECAY)
        if layers is None:
            layers = [[0, None, np.eye(m.shape[1]), 0, 0] for m in w]
        for layer, ai in zip(layers, a):
            layer[0] = e * layer[0] + (1 - e) * ai.T @ ai / len(X)
            if k == 0:
                layer[1] = np.linalg.inv(layer[0] + np.sqrt(LAM) * np.eye(len(layer[0])))
        new = [m - RATE * x[1] @ v @ x[2] for m, x, v in zip(w, layers, gradients)]
        params = as_params(new, params)
        residual = oracles.forward(params, X, tapped=False)[0] - Y
        a_behind, g_behind = oracles.per_example(params, X.astype(float), residual[None])
        for i, x in enumerate(layers):
            h_before, h_behind = a[i].mean(0) @ w[i], a_behind[i].mean(0) @ new[i]
            x[3] = e * x[3] + (1 - e) * (h_behind - h_before)
            x[4] = e * x[4] + (1 - e) * (g_behind[i][0].mean(0) - g[i][0].mean(0))
            x[2] = bfgs(x[2], *damped_twice(x[3], x[4], x[2], np.sqrt(LAM)))
            probe = x[1] @ a[i].mean(0)
            x[1] = bfgs(x[1], probe, x[0] @ probe + np.sqrt(LAM) * probe)
        out.append(params)
    return out


def test_two_steps_are_those_of_the_formulas(x64):
    """And a third, whose pairs are averages."""
    params, tx = setup()
    got, _ = run(params, tx, 3)
    for mine, want in zip(got, by_hand(params, 3), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), mine, want)


def test_the_first_step_is_that_of_the_input_side_alone(x64):
    """Where `H_A` is exact, and `H_G` the identity: FOOF."""
    params, tx = setup()
    (got,), _ = run(params, tx, 1)
    foof = ko.foof(ESTIMATOR.layers(params, X, Y), damping=np.sqrt(LAM))
    (want,), _ = run(params, optax.chain(foof, optax.sgd(RATE)), 1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), got, want)


def test_pairs_are_the_matrix_while_all_are_kept(x64):
    params, tx = setup()
    got, _ = run(*setup(ko.k_bfgs_l, memory=4), 4)
    want, _ = run(params, tx, 4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8), got[-1], want[-1])


def test_it_trains():
    params, tx = setup()
    out, state = run(params, tx, 30)
    start, end = (losses(p, X, Y).mean() for p in (params, out[-1]))
    assert end < 0.5 * start and state.accepted_steps == 30


def test_a_step_that_ends_nowhere_is_left_out():
    """Finite in front of it, not behind it."""
    params, tx = setup(learning_rate=1e38)
    out, state = run(params, tx, 2)
    h.assert_equal(out[-1], params)
    assert (state.accepted_steps, state.skipped_steps) == (0, 2)
    h.assert_equal(state.pairs, tx.init(params).pairs)


def test_what_it_cannot_take_is_said():
    params, tx = setup()
    state = tx.init(params)
    with pytest.raises(ValueError, match="k_bfgs.update got no `curvature`"):
        tx.update(params, state, params, curvature=None)
    fisher = ko.fisher(oracles.regressor)
    curvature = fisher.at(params, X, key=jax.random.key(0))
    with pytest.raises(ValueError, match="averages output gradients themselves"):
        tx.update(params, state, params, curvature=curvature)
    with pytest.raises(TypeError, match="a str, which cannot be taken at other parameters"):
        tx.update(params, state, params, curvature="curvature")
    for words, message in (
        ({"damping": 2.0}, "damping=2.0; expected damping <= 1"),
        ({"uncovered": "graft"}, "'pass', 'raise'"),
        ({"decay": -1}, "decay=-1"),
    ):
        with pytest.raises(ValueError, match=f"k_bfgs: .*{message}"):
            setup(**words)
    with pytest.raises(ValueError, match="k_bfgs_l: memory=0"):
        setup(ko.k_bfgs_l, memory=0)
    with pytest.raises(TypeError, match="k_bfgs_l: memory is 2.5; expected a Python int"):
        setup(ko.k_bfgs_l, memory=2.5)


def test_layers_without_pairs_are_left_over_by_name():
    params = {"table": jnp.ones((5, 3)), "w": jnp.ones((3, 2)), "s": jnp.ones(2)}

    def losses(params, tokens):
        x = ko.tap_dense(
            params["table"][tokens] @ params["w"], params["table"][tokens], params["w"]
        )
        return ko.tap_scale_shift(params["s"] * x, x, params["s"]).sum(1)

    estimator, tokens = ko.empirical_fisher(losses), jnp.arange(4)
    layers = estimator.layers(params, tokens)
    with pytest.raises(ValueError, match="no pairs of pre-activations"):
        ko.k_bfgs(layers, learning_rate=0.5, uncovered="raise")
    tx = ko.k_bfgs(layers, learning_rate=0.5)
    curvature = estimator.at(params, tokens)
    step = jax.jit(tx.update)
    updates, state = step(params, tx.init(params), params, curvature=curvature)
    assert list(state.pairs) == ["dense_3x2"]
    np.testing.assert_allclose(updates["s"], -0.5 * params["s"])
