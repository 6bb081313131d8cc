"""Kernels with a factor for every row or column, of rank one, padded or joined along a window, and
biases that are sums: each parameter is a layer of its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import oracles
from tests.capture.test_kernels import AXES, IMAGES, TOKENS, X, normal
from tests.layers.gradients import assert_gradients, squares

CONSTANT = np.array([1.0, -2.0, 0.5])


def conv(x, w, strides=(1, 1), padding="SAME", **options):
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=AXES, **options)


def factors(p, x):
    """Of rows and of columns, learned and constant, in front of slices, in a part that is
    recomputed.
    """
    x = jnp.tanh(x @ (p["w"] * p["columns"]) + x @ (p["rows"][:, None] * p["w"] * CONSTANT))
    both = p["u"] * p["wide"]
    x = (x @ both[:, :3]) * jnp.tanh(x @ both[:, 3:])
    scaled = p["v"] * p["columns"]
    return jax.checkpoint(lambda k, x: jnp.tanh(x @ k))(scaled, x)


FACTORS = {
    "w": normal(3, 3),
    "columns": normal(3),
    "rows": normal(3) + 1,
    "u": normal(3, 6),
    "wide": normal(1, 6),
    "v": normal(3, 3) - 0.5,
}


def stacked(p, x):
    """Of every layer of a scan, and the same for all of them."""
    layers = p["w"] * p["columns"][:, None] * p["same"]
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, layers)[0]


STACKED = {"w": normal(2, 3, 3), "columns": normal(2, 3), "same": normal(3)}


def rank_one(p, x):
    return jnp.tanh(x @ (p["u"][:, None] * p["v"]) + x @ jnp.outer(p["v"], p["u"]))


RANK_ONE = {"u": normal(3), "v": normal(3) + 1}


def padded(p, x):
    """Numbers of which some are constants; the second is padded with ones."""
    x = jnp.tanh(x @ jnp.pad(p["w"], ((1, 0), (0, 2))))
    return x @ jnp.pad(p["v"], ((0, 0), (1, 0)), constant_values=1.0)[:3]


PADDED = {"w": normal(2, 1), "v": normal(3, 2)}


def windows(p, x):
    """Joined along one axis and both, with strides, dilations and groups; padded; with factors."""
    x = jnp.tanh(conv(x, jnp.concatenate([p["a"], p["b"]], 0), (2, 1), rhs_dilation=(2, 1)))
    both = jnp.concatenate([p["c"], jnp.concatenate([p["d"], p["e"]], 1)], 0)
    x = jnp.tanh(conv(x, both, padding=((1, 2), (0, 1)), lhs_dilation=(2, 1)))
    grouped = jnp.concatenate([p["f"], p["g"]], 1) * p["columns"]
    x = jnp.tanh(conv(x, grouped, feature_group_count=2))
    small = jnp.pad(p["h"] * p["rows"][:, None], ((1, 0), (0, 1), (0, 0), (0, 0)))
    return conv(x, small)


WINDOWS = {
    "a": normal(1, 3, 2, 2),
    "b": normal(2, 3, 2, 2),
    "c": normal(1, 3, 2, 2) - 0.5,
    "d": normal(2, 2, 2, 2),
    "e": normal(2, 1, 2, 2),
    "f": normal(1, 1, 1, 2),
    "g": normal(1, 2, 1, 2),
    "columns": normal(2),
    "h": normal(1, 2, 2, 2),
    "rows": normal(2) + 1,
}


def sums_of_biases(p, x):
    """Also where a part of the sum is no parameter, and of a product that is taken away."""
    x = jnp.tanh(x @ p["w"] + (p["a"] - (p["b"] - CONSTANT)))
    return (p["c"] + p["d"]) - x @ p["v"]


SUMS = {
    "w": normal(3, 3),
    "a": normal(3),
    "b": normal(3) - 1,
    "c": normal(2),
    "d": normal(2) + 1,
    "v": normal(3, 2),
}


def table(p, tokens):
    return jnp.tanh((p["table"] * p["columns"])[tokens])


MODELS = {
    "factors": (factors, FACTORS, X),
    "factors of a stack": (stacked, STACKED, X),
    "rank one": (rank_one, RANK_ONE, X),
    "padded": (padded, PADDED, X),
    "windows": (windows, WINDOWS, IMAGES),
    "sums of biases": (sums_of_biases, SUMS, X),
    "columns of a table": (table, {"table": normal(5, 3), "columns": normal(3)}, TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gives_its_own_gradient_back(x64, name):
    model, params, x = MODELS[name]
    layers = assert_gradients(lambda p, x: squares(model(p, x)), params, x, rtol=1e-10)
    assert not any(layer.partly for layer in layers)
    assert all(layer.per_example for layer in layers)


def masked(p, x):
    return x @ (p["other"] * np.tri(3))


def weight_norm(p, x):
    return x @ (2.0 * p["other"] / jnp.linalg.norm(p["other"], axis=0))


def standardised(p, x):
    w = p["other"]
    return x @ ((w - w.mean(0)) / w.std(0))


def spectral_norm(p, x):
    """What the norm is made of are products with the weight, but of no data."""
    u, v = jnp.ones(3), jnp.arange(3.0)
    return x @ (p["other"] / (u @ p["other"] @ v))


@pytest.mark.parametrize("model", [masked, weight_norm, standardised, spectral_norm])
def test_a_function_of_a_parameter_is_named(model):
    params = {"other": jnp.asarray(normal(3, 3)), "w": jnp.asarray(normal(3, 2))}
    predict = lambda p, x: ko.Normal(jnp.tanh(model(p, x)) @ p["w"])
    layers = ko.ggn(predict).layers(params, X)
    assert [layer.path for layer in layers] == ["w"]
    (left,) = layers.uncovered
    assert left.path == "other" and "used by" in left.reason
    assert "test_kernel_shapes.py" in left.where


def test_a_module_whose_kernel_is_made_outside_has_the_rows_of_data_alone(x64):
    """The product that makes the kernel is read by nothing but the module's tap."""
    projection, params = normal(3, 3) + 1, {"w": jnp.asarray(normal(3, 2))}
    dense = nn.Dense(2, use_bias=False)

    def measured(predict):
        estimator = ko.ggn(lambda p, x: ko.Normal(predict(p, x)))
        layers = estimator.layers(params, X)
        (layer,) = layers
        assert (layer.uses, layer.rows, layer.per_example) == (1, len(X), True)
        return estimator.at(params, X).statistics(oracles.plan(layers))[0]

    got = measured(lambda p, x: dense.apply({"params": {"kernel": projection @ p["w"]}}, x))
    apart = measured(lambda p, x: (x @ projection) @ p["w"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, apart)


def test_gain_of_a_weight_norm_is_a_scale_of_its_rows(x64):
    """The direction is named; gain and bias are those of every row."""
    model = nn.WeightNorm(nn.Dense(3, param_dtype=jnp.float64))
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda x: normal(*x.shape) + 1, shapes)
    losses = lambda p, x: squares(jnp.tanh(model.apply({"params": p}, x)))
    layers = assert_gradients(losses, params, X, uncovered=["layer_instance/kernel"])
    assert [(x.kind, x.uses, x.per_example) for x in layers] == [("scale_shift", 1, True)]


def gain_before_the_norm(p, x):
    return x @ (p["gain"] * p["other"] / jnp.linalg.norm(p["other"], axis=0)) + p["bias"]


def gain_of_rows(p, x):
    kernel = p["gain"][:, None] * p["other"]
    return x @ (kernel * jax.lax.rsqrt(jnp.sum(p["other"] ** 2, 1, keepdims=True))).T + p["bias"]


def gain_of_a_standardised_weight(p, x):
    w = p["other"]
    return x @ (p["gain"] * (w - w.mean(0)) / jnp.sqrt(w.var(0) + 1e-4)) + p["bias"]


GAINS = [gain_before_the_norm, gain_of_rows, gain_of_a_standardised_weight]


@pytest.mark.parametrize("model", GAINS)
def test_gain_that_meets_its_weight_first(x64, model):
    """`(g w) / n = (w / n) g`: the gain and the bias behind it are those of every row of data."""
    params = {"gain": normal(3) + 1, "other": normal(3, 3), "bias": normal(3)}
    losses = lambda p, x: squares(jnp.tanh(model(p, x)))
    layers = assert_gradients(losses, params, X, uncovered=["other"], rtol=1e-10)
    assert [(x.kind, x.bias, x.uses, x.per_example) for x in layers] == [
        ("scale_shift", "bias", 1, True)
    ]
