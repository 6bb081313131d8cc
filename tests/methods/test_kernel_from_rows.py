"""The kernel of the rows of layers is that of products with `J`, for every kind of layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._tree import named_leaves
from kfac_optax.linalg.row_kernel import row_kernel
from kfac_optax.linalg.smw import kernel_of
from kfac_optax.methods.sample_space.from_rows import kernel_of_rows, rows_of_gradient
from kfac_optax.methods.sample_space.space import sample_space
from tests import oracles
from tests.helpers import computed

N = 4
SHAPES = {
    "conv": (3, 2, 4),
    "scale": (4,),
    "shift": (4,),
    "table": (5, 4),
    "twice": (4, 4),
    "bias": (4,),
    "head": (4, 3),
    "whole": (4, 2),
}
_conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NWC", "WIO", "NWC"))


def _kinds(params, x, tokens):
    """A convolution in groups, a normalisation, an embedding, a layer used twice, terms of positions."""
    s = _conv(x, params["conv"], (2,), "SAME", feature_group_count=2)
    s = ko.tap_conv(s, x, params["conv"], strides=2, groups=2)
    a = s / jnp.sqrt(1 + jnp.mean(s**2, -1, keepdims=True))
    s = a * params["scale"] + params["shift"]
    s = jnp.tanh(ko.tap_scale_shift(s, a, params["scale"], params["shift"]))
    s = s + ko.tap_embedding(params["table"][tokens], tokens, params["table"])
    for _ in range(2):
        out = s @ params["twice"] + params["bias"]
        s = jnp.tanh(ko.tap_dense(out, s, params["twice"], params["bias"]))
    positions = ko.tap_dense(s @ params["head"], s, params["head"])
    return ko.Categorical(positions), s


def _two_heads(params, x, tokens):
    positions, s = _kinds(params, x, tokens)
    s = s.mean(1)
    return positions, ko.Normal(ko.tap_dense(s @ params["whole"], s, params["whole"]))


def _padded(params, x, tokens):
    weights = jnp.array([1.0, 0.0, 2.0, 0.5])[:, None] * jnp.array([1.0, 0.0, 3.0])
    return ko.Categorical(_kinds(params, x, tokens)[0].logits, weights=weights)


def _problem(predict):
    params = {name: oracles.normal(i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
    if predict is _padded:
        del params["whole"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (N, 3)))
    return params, (oracles.normal(9, (N, 6, 4)), tokens)


def _stacked(params, x):
    """Layers on top of each other in a scan, and attention-like scores between their rows."""

    def layer(h, w):
        return jnp.tanh(ko.tap_dense(h @ w, h, w)), None

    h = jax.lax.scan(layer, x, params["stack"])[0]
    return ko.Normal(ko.tap_dense(h @ params["head"], h, params["head"]))


def _problem_of_stacks():
    params = {"stack": oracles.normal(0, (3, 4, 4)), "head": oracles.normal(1, (4, 2))}
    return params, (oracles.normal(2, (N, 4)),)


def _uneven(params, x):
    """By hand: a weight with and without its bias, a scale with and without its shift."""
    h = jnp.tanh(x @ params["w"] + params["b"]) * jnp.cos(2 * x @ params["w"])
    h = jnp.tanh(h * params["scale"] + params["shift"]) * params["scale"]
    return ko.Normal(h + params["offset"])


def _problem_of_uses():
    shapes = {"w": (4, 3), "b": (3,), "scale": (3,), "shift": (3,), "offset": (3,)}
    params = {name: oracles.normal(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    return params, (oracles.normal(9, (N, 4)),)


_PROBLEMS = {_stacked: _problem_of_stacks, _uneven: _problem_of_uses}


def _kernels(estimator, params, args, others):
    """By products, and of the rows of other inputs."""
    layers = estimator.layers(params, *args)
    assert not layers.uncovered
    leaves = named_leaves(params)

    @jax.jit
    def both(params):
        curvature, other = (estimator.at(params, *x, key=jax.random.key(4)) for x in (args, others))
        sampled = estimator.spec.samples > 1
        jacobian = curvature.linearize(sampled=sampled)
        space = sample_space("here", jacobian, params, tuple(leaves), jnp.float64, None)
        products = kernel_of(space.forward, space.adjoint, space.size, jnp.float64)
        rows = rows_of_gradient("here", other, layers, leaves, sampled, None)
        return products, kernel_of_rows(rows, space, jnp.float64, None)

    return both(params)


CASES = [(_two_heads, 1), (_padded, 1), (_stacked, 1), (_stacked, 2), (_uneven, 1)]


@pytest.mark.parametrize(("predict", "samples"), CASES)
def test_rows_of_every_kind_of_layer_make_the_kernel(predict, samples, x64):
    """Two heads with terms of positions, all columns and drawn labels; padding may hold anything."""
    make = _PROBLEMS.get(predict, lambda: _problem(predict))
    params, args = make()
    others = args
    if predict is _padded:
        others = (args[0].at[1].set(jnp.nan), args[1])
    expected, got = _kernels(ko.fisher(predict, samples=samples), params, args, others)
    assert np.abs(got).max() > 0.01
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


def test_many_steps_go_by_gradients(x64):
    """Which of the two ways is taken is a matter of sizes: both are the dense product."""
    for steps in (1, 2, 5):
        a, g = oracles.normal(0, (2, 3, steps, 4)), oracles.normal(1, (2, 2, 3, steps, 3))
        gradients = np.einsum("xbtp,kxbtq->bkxpq", a, g).reshape(6, -1)
        np.testing.assert_allclose(row_kernel(a, g), gradients @ gradients.T, rtol=1e-12)


def _loose(params, x):
    return ko.Normal(computed(params["gain"]) * ko.tap_dense(x @ params["w"], x, params["w"]))


def _tied(params, x):
    h = ko.tap_embedding(params["table"][x], x, params["table"])
    return ko.Categorical(ko.tap_dense(h @ params["table"].T, h, params["table"].T))


def _both_ways(params, x):
    return ko.Normal(jnp.tanh(x @ params["w"]) @ params["w"].T)


def _shared(params, x):
    table = ko.tap_dense(jnp.eye(3) @ params["w"], jnp.eye(3), params["w"])
    return ko.Normal(x @ table)


@pytest.mark.parametrize(
    ("predict", "params", "x", "message"),
    [
        (_loose, {"gain": jnp.ones(2), "w": jnp.ones((3, 2))}, jnp.ones((N, 3)), "gain belongs"),
        (_tied, {"table": jnp.ones((3, 2))}, jnp.zeros(N, jnp.int32), "'tied_embedding' has none"),
        (_both_ways, {"w": jnp.ones((3, 2))}, jnp.ones((N, 3)), "by its transposed weight"),
        (_shared, {"w": jnp.ones((3, 2))}, jnp.ones((N, 3)), "rows shared by the examples"),
    ],
)
def test_what_has_no_rows_is_told_so(predict, params, x, message):
    estimator = ko.ggn(predict)
    tx = ko.smw(estimator.layers(params, x))
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, curvature=estimator.at(params, x))
    tx = ko.smw()
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, curvature=estimator.at(p, x)), params)
