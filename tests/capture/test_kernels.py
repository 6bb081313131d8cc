"""Kernels made of parameters outside of where they meet data; slices, convolutions and tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.capture.kernels.distribute import distributed
from tests import oracles
from tests.layers.gradients import assert_gradients, squares

N = 5
X = np.random.default_rng(0).normal(size=(N, 3))
IMAGES = np.random.default_rng(1).normal(size=(N, 4, 4, 2))
TOKENS = np.asarray([[0, 1, 4], [2, 2, 3], [0, 4, 1], [3, 1, 1], [1, 1, 0]])
AXES = ("NHWC", "HWIO", "NHWC")


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


def outside(p, x):
    """Kernels of parts that are recomputed, of a scan, and of the layers that a scan goes over."""
    layer = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))
    x = layer(p["w"] + p["down"] @ p["up"], x)
    joined = jnp.concatenate([p["left"], p["right"]], 1)
    # recomputed in every step, and handed on from step to step
    step = lambda h, _: ((layer(joined / 2, h[0]), h[1]), h[0] @ h[1])
    (x, _), ys = jax.lax.scan(step, (x, 2.0 * p["held"].T), None, length=2)
    stack = p["stack"] - jnp.einsum("lir,lro->lio", p["a"], p["b"])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x + ys[0] + ys[1], stack)[0]


def outside_apart(p, x):
    """The same, products written apart."""

    @jax.checkpoint
    def merged(w, down, up, x):
        return jnp.tanh(x @ w + x @ down @ up)

    @jax.checkpoint
    def joined(left, right, x):
        return jnp.tanh(jnp.concatenate([x / 2 @ left, x / 2 @ right], 1))

    x = merged(p["w"], p["down"], p["up"], x)
    step = lambda h, _: (joined(p["left"], p["right"], h), (2.0 * h) @ p["held"].T)
    x, ys = jax.lax.scan(step, x, None, length=2)
    each = p["stack"], p["a"], p["b"]
    last = lambda h, w: (jnp.tanh(h @ w[0] - h @ w[1] @ w[2]), None)
    return jax.lax.scan(last, x + ys[0] + ys[1], each)[0]


OUTSIDE = {
    "w": normal(3, 3),
    "down": normal(3, 1),
    "up": normal(1, 3),
    "left": normal(3, 2),
    "right": normal(3, 1),
    "held": normal(3, 3) - 0.5,
    "stack": normal(2, 3, 3),
    "a": normal(2, 3, 1),
    "b": normal(2, 1, 3),
}


def slices(p, x):
    """Of sums, products, joins, stacks, and of slices of them."""
    query, key, value = jnp.split(p["qkv"] + p["down"] @ p["up"], 3, 1)
    first, second = jnp.stack([p["u"], -p["v"]])
    both = jnp.concatenate([p["l"], p["r"]], 1).T
    x = jnp.tanh(x @ query) * (x @ key) + x @ value
    x = jnp.tanh(x @ first) @ second
    same = jax.lax.slice(both, (0, 0), both.shape)
    return x @ both[1:][:3].T + x @ same[4][:, None]


SLICES = {
    "qkv": normal(3, 9),
    "down": normal(3, 2),
    "up": normal(2, 9),
    "u": normal(3, 3),
    "v": normal(3, 3) - 0.5,
    "l": normal(3, 2),
    "r": normal(3, 4),
}


def convolutions(p, x):
    """Joined along outputs and inputs, summed, scaled, of low rank on either side, in groups."""
    conv = lambda x, w, **k: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=AXES, **k
    )
    x = jnp.tanh(conv(x, jnp.concatenate([p["u"], p["v"]], -1)))
    x = conv(x, jnp.concatenate([p["s"], p["t"] / 3], -2))
    x = jnp.tanh(conv(x, p["w"] + jnp.einsum("hwir,ro->hwio", p["a"], p["b"])))
    x = jnp.tanh(conv(x, jnp.einsum("ir,rohw->hwio", p["c"], p["d"])))
    return conv(x, p["g"] - p["h"].transpose(1, 0, 2, 3), feature_group_count=2)


CONVOLUTIONS = {
    "u": normal(3, 3, 2, 1),
    "v": normal(3, 3, 2, 2),
    "s": normal(2, 2, 1, 2),
    "t": normal(2, 2, 2, 2),
    "w": normal(1, 2, 2, 2),
    "a": normal(1, 2, 2, 1),
    "b": normal(1, 2),
    "c": normal(2, 1),
    "d": normal(1, 2, 2, 2),
    "g": normal(1, 2, 1, 2),
    "h": normal(2, 1, 1, 2) - 0.5,
}


def tables(p, tokens):
    """Joined along rows and columns, summed, of low rank; tokens beyond the end are padding."""
    rows = jnp.concatenate([p["first"], jnp.concatenate([p["left"], p["right"]], 1)])
    known = (tokens != 2)[..., None]
    padded = jnp.where(tokens == 2, 9, tokens)
    low = jax.jit(jnp.take, static_argnums=2)(p["a"] @ p["b"] - 2.0 * p["whole"], padded, 0)
    # rows of padding are NaN, of which nothing may be left in what is measured
    return jnp.tanh(rows[tokens]) * jnp.where(known, low, 1.0)


TABLES = {
    "first": normal(2, 3),
    "left": normal(3, 1),
    "right": normal(3, 2),
    "a": normal(5, 2),
    "b": normal(2, 3),
    "whole": normal(5, 3),
}


def stored_apart(p, x):
    """Layers that are stacked for a scan, from the last to the first; biases joined as kernels are."""
    layers = [p["one"], p["two"]]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    step = lambda h, q: (jnp.tanh(h @ q["w"] + q["b"]), h @ q["w"] * q["scale"])
    x, ys = jax.lax.scan(jax.checkpoint(step), x, stack, reverse=True)
    made = (x + ys[1] * ys[0]) @ jnp.concatenate([p["q"]["w"], p["k"]["w"]], 1)
    query, key = jnp.split(made + jnp.concatenate([p["q"]["b"], p["k"]["b"]]), 2, 1)
    return query * jnp.tanh(key)


STORED_APART = {
    name: {"w": normal(3, width) + i, "b": normal(width) - i}
    for i, (name, width) in enumerate({"one": 3, "two": 3, "q": 2, "k": 2}.items())
}
STORED_APART["one"]["scale"], STORED_APART["two"]["scale"] = normal(3), 1 + normal(3)
MODELS = {
    "outside": (outside, OUTSIDE, X),
    "slices": (slices, SLICES, X),
    "convolutions": (convolutions, CONVOLUTIONS, IMAGES),
    "tables": (tables, TABLES, TOKENS),
    "stored apart": (stored_apart, STORED_APART, X),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_kernel_gives_its_own_gradient_back(x64, name):
    model, params, x = MODELS[name]
    layers = assert_gradients(lambda p, x: squares(model(p, x)), params, x, rtol=1e-10)
    assert not any(layer.partly for layer in layers)
    assert all(layer.per_example for layer in layers)


def test_statistics_are_those_of_products_written_apart(x64):
    params = jax.tree.map(jnp.asarray, OUTSIDE)

    def measured(model):
        estimator = ko.ggn(lambda p, x: ko.Normal(model(p, x)))
        layers = estimator.layers(params, X)
        plan = oracles.plan(layers)
        statistics = jax.jit(lambda p: estimator.at(p, X).statistics(plan))(params)
        return dict(zip([layer.path for layer in layers], statistics[0], strict=True))

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, measured(outside), measured(outside_apart))


def test_a_scale_that_meets_the_deviation_of_a_batch_first(x64):
    """Scale and shift are those of every row, not of the one that all examples share."""

    def normalised(p, x):
        inverse = p["scale"] * jax.lax.rsqrt(x.var(0, keepdims=True) + 1e-3)
        return jnp.tanh((x - x.mean(0)) * inverse + p["shift"]) @ p["w"]

    params = {"scale": normal(3), "shift": normal(3), "w": normal(3, 2)}
    layers = assert_gradients(lambda p, x: squares(normalised(p, x)), params, X, rtol=1e-10)
    assert [(x.kernel, x.bias, x.per_example) for x in layers] == [
        ("scale", "shift", True),
        ("w", None, True),
    ]


@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_rows_beyond_a_joined_table_are_what_they_were(mode):
    """Numbers that are no row, some of them negative, of a type without sign where there are none."""
    params = {"u": jnp.ones((2, 3)), "v": jnp.full((300, 3), 2.0)}
    inside = mode == "promise_in_bounds"
    tokens = (
        jnp.asarray([[0, 1], [2, 255]], "uint8") if inside else jnp.asarray([[-1, 302], [1, -400]])
    )

    def model(p, tokens):
        return jnp.concatenate([p["u"], p["v"]]).at[tokens].get(mode=mode)

    closed = jax.make_jaxpr(model)(params, tokens)
    new = distributed(closed, 2)
    assert new is not closed
    (got,) = jax.extend.core.jaxpr_as_fun(new)(*jax.tree.leaves(params), tokens)
    np.testing.assert_array_equal(got, model(params, tokens))


def recomputed(p, x):
    layer = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))
    return layer(p["other"] * np.tri(3), x)


def of_norm_one(p, x):
    w = p["other"] / jnp.linalg.norm(p["other"])
    return jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=2)[0]


def of_a_bank(p, x):
    """A mixture of kernels, of which none is one of two convolutions in a row."""
    kernel = jnp.einsum("wior,r->wio", p["other"][:, None, None], p["other"][:, 0])
    axes = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x[:, :, None], kernel, (1,), "SAME", dimension_numbers=axes)


def polynomial(p, x):
    """Of degree 3 to the 20th: written out, it would have 4 to the 20th products."""
    w = p["other"] / 9
    for _ in range(20):
        w = 1.5 * w - 0.5 * w @ w.T @ w
    return x @ w


WHOLE = [recomputed, of_norm_one, of_a_bank, polynomial]


@pytest.mark.parametrize("model", WHOLE)
def test_what_does_not_come_apart_is_named_with_its_line(model):
    """And refused where nothing may be left over."""
    params = {"other": jnp.asarray(normal(3, 3)), "w": jnp.asarray(normal(3, 2))}
    predict = lambda p, x: ko.Normal(x @ p["w"] + model(p, x).reshape(N, -1)[:, :2])
    layers = ko.ggn(predict).layers(params, X)
    assert [layer.path for layer in layers] == ["w"]
    (left,) = layers.uncovered
    assert left.path == "other" and "outside any supported layer" in left.reason
    assert "test_kernels.py" in left.where
    with pytest.raises(ValueError, match=r"other.*test_kernels\.py"):
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")


def test_what_ends_in_a_stopped_gradient_is_no_use(x64):
    """A weight that is rounded for the forward pass only has the gradient of one that is not."""

    def model(p, x):
        rounded = p["w"] + jax.lax.stop_gradient(jnp.round(p["w"], 1) - p["w"])
        return jnp.tanh(x @ rounded + p["b"]) @ p["v"]

    params = {"w": normal(3, 4), "b": normal(4), "v": normal(4, 2)}
    layers = assert_gradients(lambda p, x: squares(model(p, x)), params, X, rtol=1e-10)
    assert not any(layer.partly for layer in layers)
    ko.kfac(layers, learning_rate=0.1, uncovered="raise")


def test_what_fails_to_come_apart_leaves_nothing_behind():
    """Slices of the parts, made while a kernel whose window is of another shape was tried."""

    def model(a, b, w, u, x):
        kernel = jnp.concatenate([a, b], 0)[..., :3].reshape(1, 9, 2, 3)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=AXES)
        return y.mean((1, 2)) @ (w + u)

    parameters = [normal(1, 3, 2, 4), normal(2, 3, 2, 4), normal(3, 2), normal(3, 2)]
    closed = jax.make_jaxpr(model)(*map(jnp.float32, parameters), jnp.float32(IMAGES))
    names = [eqn.primitive.name for eqn in distributed(closed, len(parameters)).jaxpr.eqns]
    # the sum of kernels has come apart, and the slice is the model's own
    assert names.count("dot_general") == 2
    assert names.count("slice") == 1
