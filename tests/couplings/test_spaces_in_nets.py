"""Coarse spaces in a net with a grouped convolution, a stack, a normalisation, an uncovered
parameter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.couplings.spaces import SPACES
from kfac_optax.engine.state import CurvatureState, find_states
from tests import oracles
from tests.engine.test_factorizations_in_a_row import FISHER, SIZES, N, side_by_side
from tests.helpers import computed

DAMPING = 0.05
SHAPES = {
    "conv": (2, 1, 4),
    "conv_bias": (4,),
    "scale": (4,),
    "shift": (4,),
    "stack": (2, 4, 4),
    "stack_bias": (2, 4),
    "head": (4, 2),
    "gain": (2,),
}
# of every row, in order of execution: its weight and its bias, and where in them
ROWS = [
    ("conv", "conv_bias", (..., slice(0, 2))),
    ("conv", "conv_bias", (..., slice(2, 4))),
    ("stack", "stack_bias", (0,)),
    ("stack", "stack_bias", (1,)),
    ("head", None, (...,)),
]


def predict(p, x):
    s = jax.lax.conv_general_dilated(
        x, p["conv"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )
    s = ko.tap_conv(s + p["conv_bias"], x, p["conv"], p["conv_bias"], padding="VALID", groups=2)
    a = s / jnp.sqrt(1 + jnp.mean(s**2, -1, keepdims=True))
    x = jnp.tanh(ko.tap_scale_shift(a * p["scale"] + p["shift"], a, p["scale"], p["shift"])).mean(1)

    def layer(h, weights):
        w, b = weights
        return jnp.tanh(ko.tap_dense(h @ w + b, h, w, b)), None

    x, _ = jax.lax.scan(layer, x, (p["stack"], p["stack_bias"]))
    return ko.Normal(computed(p["gain"]) * ko.tap_dense(x @ p["head"], x, p["head"]))


ESTIMATOR = ko.ggn(predict)


@functools.cache
def net():
    params = {name: oracles.normal(i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
    x = oracles.normal(20, (5, 4, 2))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda v: predict(unravel(v), x).mean))(flat))
    covered = flat_of({name: np.full(shape, name != "gain") for name, shape in SHAPES.items()})
    fisher = np.einsum("nip,niq->pq", jacobian, jacobian) / len(x) * covered * covered[:, None]
    return params, x, ESTIMATOR.layers(params, x), fisher + DAMPING * np.diag(covered), covered


def flat_of(tree):
    return np.concatenate([np.ravel(tree[name]).astype(float) for name in sorted(tree)])


def place(row, weight, bias):
    """A vector like the parameters that lives on one row, from values for its weight and bias."""
    tree = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    kernel, shift, where = ROWS[row]
    tree[kernel][where] = weight
    if shift is not None:
        tree[shift][where] = bias
    return flat_of(tree)


def masks():
    return np.stack([place(row, 1, 1) for row in range(len(ROWS))])


@functools.cache
def updates(space=None):
    """Of some gradients after one refresh, `[gradients, n]`, for the one-level optimizer where
    there is no space.
    """
    params, x, layers, _, _ = net()
    _, unravel = jax.flatten_util.ravel_pytree(params)
    coupling = None if space is None else ko.deflated("a-def2", space=space, coarse="exact")
    tx = ko.scale_by_curvature(layers, block=ko.kronecker(), coupling=coupling, damping=DAMPING)

    def run(gradients):
        at = ESTIMATOR.at(params, x)
        _, state = tx.update(params, tx.init(params), curvature=at, refresh=True)
        one = lambda g: tx.update(unravel(g), state, curvature=at, refresh=False)[0]
        return jax.vmap(lambda g: jax.flatten_util.ravel_pytree(one(g))[0])(gradients), state

    given = (
        gradients()
        if space is not None
        else np.concatenate([gradients(), np.eye(len(gradients()[0]))])
    )
    return jax.jit(run)(given)


def gradients():
    *_, damped, covered = net()
    return np.asarray(oracles.normal(3, (4, len(damped)))) * covered


def leading_matrix(factor, copy):
    """`u_A u_G^T` of one matrix of a bucket, the bias in the last row where there is one."""
    u_a, u_g = (np.linalg.eigh(np.asarray(f[copy]))[1][:, -1] for f in factor)
    return np.outer(u_a, u_g)


def leading():
    """Rows of the spectral `Z`, from the factors in the one-level state."""
    _, state = updates()
    (found,) = find_states(state, CurvatureState)
    grouped, stacked, head = (
        found.factors[name] for name in ("conv_3x2_bias", "dense_5x4_bias", "dense_4x2")
    )
    copies = [leading_matrix(factor, k) for factor in (grouped, stacked) for k in range(2)]
    grouped = [place(row, copies[row][:2, None], copies[row][2]) for row in (0, 1)]
    stacked = [place(row, copies[row][:4], copies[row][4]) for row in (2, 3)]
    return np.stack([*grouped, *stacked, place(4, leading_matrix(head, 0), None)])


@pytest.mark.parametrize("space", SPACES)
def test_updates_are_the_dense_ones(x64, space):
    """`x0 + Z^T E^{-1} Z (g - F_lambda x0)`, `E` with the whole Gram matrix; never a worse model."""
    *_, damped, _ = net()
    g = gradients()
    both, _ = updates()
    fine, got = np.asarray(both)[: len(g)], np.asarray(updates(space)[0])
    inverse = np.asarray(both)[len(g) :].T
    for one, first, x in zip(g, fine, got):
        rows = masks()
        z = {
            "sums": lambda: rows,
            "updates": lambda: rows * first,
            "residual": lambda: rows * (inverse @ (one - damped @ first)),
            "krylov": lambda: np.concatenate([rows, rows * first]),
            "spectral": leading,
        }[space]()
        wanted = first + z.T @ np.linalg.solve(z @ damped @ z.T, z @ (one - damped @ first))
        np.testing.assert_allclose(x, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())
        assert np.abs(z @ (damped @ x - one)).max() < 1e-9 * np.abs(z).max()
    value = lambda x: np.einsum("ni,ij,nj->n", x, damped, x) / 2 - np.einsum("ni,ni->n", g, x)
    assert (value(got) <= value(fine) + 1e-12).all() and (value(got) < value(fine) - 1e-4).any()
    outside = masks().sum(0) == 0
    np.testing.assert_array_equal(got[:, outside], fine[:, outside])


def test_blocks_without_eigenvectors_are_named():
    *_, layers, _, _ = net()
    coupling = ko.deflated(space="spectral")
    with pytest.raises(
        ValueError,
        match=r"deflated: space='spectral', but layer 'conv' has the block 'kronecker \(chol",
    ):
        ko.kfac(layers, learning_rate=0.1, inverse="cholesky", coupling=coupling)
    with pytest.raises(
        ValueError, match=r"no eigenvectors of its factors; expected kronecker\('eigh'\)"
    ):
        ko.coverage(layers, block=ko.low_rank(2), coupling=coupling)
    assert "a-def2 (batch, factored, spectral)" in str(ko.coverage(layers, coupling=coupling))


def test_tokens_are_the_eigenvectors_of_an_embedding(x64):
    """`A = diag(counts)`: the step along the most frequent token, and `E` of its own curvature."""
    table, tokens = oracles.normal(0, (4, 3)), jnp.asarray([[2, 2], [1, 2], [0, 2]])
    fisher = ko.ggn(lambda w, t: ko.Normal(ko.tap_embedding(w["e"][t], t, w["e"]).sum(1)))
    layers = fisher.layers({"e": table}, tokens)
    tx = ko.scale_by_curvature(
        layers, coupling=ko.deflated(space="spectral"), damping=DAMPING, block=ko.kronecker()
    )
    one = ko.scale_by_curvature(layers, damping=DAMPING, block=ko.kronecker())
    at, g = fisher.at({"e": table}, tokens), {"e": oracles.normal(1, (4, 3))}
    new, old = (
        jax.jit(lambda g, t=t: t.update(g, t.init(g), curvature=at))(g)[0]["e"] for t in (tx, one)
    )
    added = np.asarray(new - old)
    assert not added[[0, 1, 3]].any() and np.abs(added[2]).max() > 1e-3
    u = added[2] / np.linalg.norm(added[2])
    damped = np.asarray(at.quadratic_form([{"e": jnp.zeros((4, 3)).at[2].set(u)}]))[0, 0] + DAMPING
    x = jnp.asarray(new)
    product = at.vector_product({"e": x})["e"] + DAMPING * x
    assert damped > 1 and abs(u @ np.asarray(product - g["e"])[2]) < 1e-10


@pytest.mark.parametrize("space", ["spectral", "krylov"])
def test_factorizations_follow_one_another(space):
    params = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        jax.eval_shape(lambda: oracles.make_params(0, SIZES)),
    )
    x, key = jnp.ones((N, SIZES[0])), jax.random.key(0)
    tx = ko.kfac(FISHER.layers(params, x), learning_rate=0.1, coupling=ko.deflated(space=space))

    def step(state, x, key):
        return tx.update(
            params, state, params, curvature=FISHER.at(params, x, key=key), refresh=True
        )

    text = jax.jit(step).lower(jax.eval_shape(tx.init, params), x, key).compile().as_text()
    pairs, calls = side_by_side(text)
    assert calls and not pairs
