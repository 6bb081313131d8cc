"""Weights of which a mask leaves some entries: the exact inverse of the Kronecker product on those."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.linalg.staircase import entries, staircase
from tests import oracles

P, Q, N = 5, 4, 7
# an output sees the inputs of at most its degree; some outputs see none
DEGREES = np.array([2, 0, 1, 2, 0]), np.array([1, 0, 2, -1])
MADE = (DEGREES[0][:, None] <= DEGREES[1]).astype(float)
MASKS = {
    "made": MADE,
    "triangle": np.tri(P, Q),
    "rows left out": np.array([1, 0, 1, 1, 0])[:, None] * np.ones((P, Q)),
    "whole": np.ones((P, Q)),
}


def dense(params, x, mask):
    s = x @ (params["w"] * mask) + params["b"]
    return ko.tap_dense(s, x, params["w"], params["b"], mask=mask)


def problem(mask):
    estimator = ko.ggn(lambda p, x: ko.Normal(jnp.tanh(dense(p, x, mask)) @ p["v"]))
    params = {"w": oracles.normal(0, (P, Q)), "b": oracles.normal(1, Q), "v": jnp.eye(Q)}
    x = oracles.normal(2, (N, P))
    return estimator, params, x, estimator.layers(params, x)


def psd(seed, n):
    """Far from diagonal."""
    root = oracles.normal(seed, (n, n)) + 1
    return root @ root.T


def there_of(mask):
    return np.concatenate([np.asarray(mask) != 0, np.ones((1, Q), bool)]).ravel()


@pytest.mark.parametrize("name", MASKS)
def test_solves_are_those_of_the_entries_that_are_there(x64, name):
    """Solve, product, root and determinant against `A (x) G` without the other rows and columns."""
    mask = MASKS[name]
    *_, layers = problem(mask)
    block, there = ko.masked(layers.layers[0]), there_of(mask)
    factors, damping = Factors(psd(3, P + 1), psd(4, Q)), jnp.asarray(0.3)
    a, g = factors
    pi = np.sqrt(np.trace(a) / (P + 1) / (np.trace(g) / Q))
    shifted = np.kron(a + pi * 0.3**0.5 * np.eye(P + 1), g + 0.3**0.5 / pi * np.eye(Q))
    right = shifted[np.ix_(there, there)]
    inverse = block.factorize(factors, damping)
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)

    v = oracles.normal(5, (P + 1, Q))
    solved = np.ravel(block.solve(inverse, v, damping))
    close(solved[there], np.linalg.solve(right, np.ravel(v)[there]))
    assert (solved[~there] == 0).all()
    close(
        np.ravel(block.multiply(factors, v))[there],
        np.kron(a, g)[np.ix_(there, there)] @ np.ravel(v)[there],
    )
    # columns of R, so that R R^T is what solve applies
    units = jnp.eye(v.size).reshape(-1, *v.shape)
    root = jax.vmap(lambda z: block.root_solve(inverse, z, damping).ravel())(units).T
    close((root @ root.T)[np.ix_(there, there)], np.linalg.inv(right))
    close(block.logdet(inverse, damping, v.shape), np.linalg.slogdet(right)[1])


def test_statistics_and_step_of_a_masked_layer(x64):
    """Factors are those of the kernel, the step a Newton step where the outputs are linear."""
    estimator, params, x, layers = problem(MADE)
    layer = layers.layers[0]
    assert (layer.kind, layer.shape, layer.coupled) == ("masked", (P + 1, Q), False)
    np.testing.assert_array_equal(entries(layer.mask), MADE != 0)
    tx = ko.kfac(layers, learning_rate=1.0, kl_clip=None, damping=1e-2, uncovered="raise")

    def loss(p):
        return jnp.mean(jnp.sum(jnp.tanh(dense(p, x, MADE)) ** 2, -1))

    gradient = jax.grad(loss)(params)
    update = jax.jit(lambda g, s: tx.update(g, s, params, curvature=estimator.at(params, x)))
    updates, state = update(gradient, tx.init(params))
    factors = state.preconditioner.factors["masked_6x4_bias"]
    rows = np.concatenate([x, np.ones((N, 1))], 1)
    np.testing.assert_allclose(factors.inputs[0], rows.T @ rows / N, rtol=1e-10)
    slopes = 1 - np.tanh(x @ (params["w"] * MADE) + params["b"]) ** 2
    np.testing.assert_allclose(factors.outputs[0], np.diag((slopes**2).mean(0)), atol=1e-10)
    assert (np.asarray(updates["w"])[MADE == 0] == 0).all()
    assert float(optax.tree.vdot(gradient, updates)) > 0
    assert np.isfinite(updates["w"]).all()


def test_a_masked_convolution(x64):
    """Of PixelCNN's kind: a pixel sees those before it, in every channel."""
    mask = np.array([1.0, 1.0, 0.0])[:, None, None] * np.ones((3, 2, 2))
    names = ("NHC", "HIO", "NHC")

    def model(w, x):
        s = jax.lax.conv_general_dilated(x, w * mask, (1,), "SAME", dimension_numbers=names)
        return ko.Normal(ko.tap_conv(s, x, w, mask=mask).reshape(len(x), -1))

    w, x = oracles.normal(0, (3, 2, 2)), oracles.normal(1, (N, 4, 2))
    layers = ko.ggn(model).layers(w, x)
    assert (layers.layers[0].kind, layers.layers[0].shape) == ("masked", (6, 2))
    np.testing.assert_array_equal(entries(layers.layers[0].mask), mask.reshape(6, 2) != 0)
    tx = ko.kfac(layers, learning_rate=1.0, kl_clip=None)
    updates, _ = tx.update(w * mask, tx.init(w), w, curvature=ko.ggn(model).at(w, x))
    assert (np.asarray(updates)[2] == 0).all() and (np.asarray(updates)[:2] != 0).all()


@pytest.mark.parametrize("name", [n for n, x in ko.CATALOGUE.items() if "curvature" in x.needs])
def test_every_preset_takes_layers_of_which_some_are_masked(name):
    """Those that have no block for them leave them over."""
    _, params, _, layers = problem(MADE)
    tx = ko.CATALOGUE[name].build(layers)
    jax.eval_shape(tx.init, params)


def test_what_takes_a_masked_weight_for_a_whole_one_is_refused():
    estimator, params, x, layers = problem(MADE)
    with pytest.raises(ValueError, match=r"'w'.*rank one.*masked\(layer\)"):
        ko.scale_by_curvature(layers, block=lambda layer: ko.rank_one(), damping=0.1)
    with pytest.raises(ValueError, match="kind 'masked' has none"):
        estimator.at(params, x).rows(layers)
    with pytest.raises(ValueError, match="has no mask"):
        ko.masked(layers.layers[1])
    # a use without the mask is none of the layer's
    beside = ko.ggn(lambda p, x: ko.Normal(dense(p, x, MADE) + x @ p["w"]))
    (layer,) = beside.layers({"w": params["w"], "b": params["b"]}, x)
    assert "also used by dot_general" in layer.notes[0]


def test_masks_that_are_no_staircase_are_refused():
    x = jnp.ones((N, P))
    crossed = np.eye(P, Q)
    with pytest.raises(ValueError, match=r"tap_dense: rows 0 and 1 of the mask.*nested"):
        estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w, mask=crossed)))
        estimator.layers(jnp.ones((P, Q)), x)
    with pytest.raises(ValueError, match=r"mask of shape \(5,\); expected .*\(5, 4\)"):
        estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w, mask=np.ones(5))))
        estimator.layers(jnp.ones((P, Q)), x)
    # factors are no mask: the curvature of w / 2 is another
    for factors in (MADE / 2, -MADE, np.where(MADE, np.nan, 0)):
        with pytest.raises(ValueError, match=r"a mask with \S+ in it; expected ones and zeros"):
            staircase(factors)
    with pytest.raises(TypeError, match="whose numbers are not known"):
        jax.jit(lambda mask: staircase(mask).rows)(jnp.ones((2, 2)))


def test_masks_of_modules_are_those_of_numpy_and_jax():
    """One with other numbers than ones and zeros is named, and not taken for a mask."""
    x = jnp.ones((N, 4, 2))

    def layers_of(mask):
        conv = nn.Conv(2, (3,), use_bias=False, mask=mask)
        dense = nn.Dense(1)
        params = {
            "conv": conv.init(jax.random.key(0), x)["params"],
            "dense": dense.init(jax.random.key(1), x)["params"],
        }

        def predict(p, x):
            hidden = conv.apply({"params": p["conv"]}, x)
            return ko.Normal(dense.apply({"params": p["dense"]}, hidden)[..., 0])

        return ko.ggn(predict).layers(params, x)

    mask = np.array([1.0, 1.0, 0.0])[:, None, None] * np.ones((3, 2, 2))
    for known in (mask, jnp.asarray(mask)):
        first, _ = layers_of(known)
        np.testing.assert_array_equal(entries(first.mask), mask.reshape(6, 2) != 0)
    (left,) = layers_of(mask / 2).uncovered
    assert (left.path, "not by a staircase" in left.reason) == ("conv/kernel", True)


def test_words_for_layers_with_a_mask_are_used_or_refused():
    *_, layers = problem(MADE)
    block = ko.blocks_of(ko.kronecker(sharing="reduce", positions=3))(layers.layers[0])
    assert (block.name, block.sharing, block.positions) == ("masked kronecker", "reduce", 3)
    with pytest.raises(ValueError, match=r"inverse='eigh'.*the masks of .*factored damping alone"):
        ko.kfac(layers, inverse="eigh", kl_clip=None)
    ko.kfac(layers, block=ko.kronecker("eigh"), kl_clip=None)
