"""Kernels made of parameters: each of these is a layer of the product."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.capture.kernels.distribute import distributed
from tests import oracles
from tests.layers.gradients import assert_gradients, squares

N = 5
EYE = np.eye(3)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


def adapted(p, x):
    """Low rank added to the weight, which is handed to a compiled layer."""
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return layer(p["w"] + 0.5 * (p["down"] @ p["up"]), x) + p["b"]


def stored_the_other_way(p, x):
    """Weights `[out, in]`, layers of one example, the sum in a scan over layers."""

    def layer(h, q):
        w = q["w"] - (q["up"] @ q["down"]) / 4
        return jnp.tanh(jax.vmap(lambda e: w @ e)(h) + q["b"]), None

    return jax.lax.scan(layer, x, p)[0]


def joined(p, x):
    """One product for layers side by side, and one for inputs one after another."""
    hidden = jnp.tanh(x @ jnp.concatenate([p["q"], p["k"]], 1))
    return hidden @ jnp.concatenate([p["first"], p["second"]]) + x @ jnp.roll(p["rolled"], 1, 0)


def stacked(p, x):
    return jnp.einsum("nd,kde->nke", x, jnp.stack([p["one"], -p["two"]]))


def scaled(p, x):
    """By a number, a parameter, and the number of inputs."""
    return jnp.tanh(x @ (p["w"] / np.sqrt(3)) + p["b"]) @ (p["gain"] * p["v"].T)


def regrouped(p, x):
    """Heads split off the kernel, and merged in it; a network makes a part of the weight."""
    heads = jnp.einsum("nd,dhk->nhk", x, p["in"].reshape(3, 2, 2))
    made = (p["z"] @ p["small"]).reshape(4, 2)
    return heads.reshape(N, 4) @ (p["out"].reshape(4, 2) + made)


def nearly_identity(p, x):
    return x @ (EYE + p["w"]) @ (p["v"] @ p["v"].T)


def tokens_beside_data(p, x):
    """One in front of every example, one in place of some of its rows."""
    rows = jnp.tanh(x[:, :, None] * np.linspace(0.5, 1, 2))
    rows = jnp.where(np.array([True, False, False])[:, None], p["mask"], rows)
    front = jnp.broadcast_to(p["front"], (N, 1, 2))
    rows = jnp.concatenate([front, rows], 1)
    weights = jax.nn.softmax(jnp.einsum("ntd,nsd->nts", rows, rows))
    return jnp.einsum("nts,nsd->ntd", weights, rows) @ p["w"]


X = normal(N, 3)
LOW_RANK = {"w": normal(3, 4), "down": normal(3, 2), "up": normal(2, 4), "b": normal(4)}
MODELS = {
    "adapted": (adapted, LOW_RANK, ()),
    "the other way": (
        stored_the_other_way,
        {"w": normal(2, 3, 3), "up": normal(2, 3, 1), "down": normal(2, 1, 3), "b": normal(2, 3)},
        (),
    ),
    "joined": (
        joined,
        {"q": normal(3, 1), "k": normal(3, 2), "first": normal(2, 2), "second": normal(1, 2)}
        | {"rolled": normal(3, 2)},
        (),
    ),
    "stacked": (stacked, {"one": normal(3, 2), "two": normal(3, 2) ** 2}, ()),
    "scaled": (
        scaled,
        {"w": normal(3, 4), "b": normal(4), "v": normal(2, 4), "gain": normal()},
        (),
    ),
    "regrouped": (
        regrouped,
        {"in": normal(3, 4), "out": normal(2, 2, 2), "z": normal(2), "small": normal(2, 8)},
        ("z", "small"),
    ),
    "tokens": (
        tokens_beside_data,
        {"front": normal(1, 1, 2), "mask": normal(2), "w": normal(2, 2)},
        (),
    ),
    "nearly identity": (nearly_identity, {"w": normal(3, 3), "v": normal(3, 2)}, ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_kernel_gives_its_own_gradient_back(x64, name):
    model, params, uncovered = MODELS[name]
    losses = lambda p, x: squares(model(p, x))
    layers = assert_gradients(losses, params, X, uncovered=uncovered, rtol=1e-10)
    assert not any(layer.partly for layer in layers)
    assert all(layer.per_example for layer in layers)


def test_statistics_are_those_of_products_written_apart(x64):
    """`x (w + a b)` and `x w + (x a) b`."""

    def apart(p, x):
        s = x @ p["w"] + (x * 0.5) @ p["down"] @ p["up"]
        return jnp.tanh(s) + p["b"]

    params = jax.tree.map(jnp.asarray, LOW_RANK)

    def measured(model):
        estimator = ko.ggn(lambda p, x: ko.Normal(model(p, x)))
        plan = oracles.plan(estimator.layers(params, X))
        return jax.jit(lambda p: estimator.at(p, X).statistics(plan))(params)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
    jax.tree.map(close, measured(adapted), measured(apart))


def test_merged_parameters_of_modules_are_layers(x64):
    """Adapters merged before the model is applied: its own taps see no parameter, and give way."""
    module = nn.Sequential([nn.Dense(4), jnp.tanh, nn.Dense(2)])
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    base = jax.tree.map(lambda x: jnp.asarray(normal(*x.shape)), shapes)
    low = {"a": jnp.asarray(normal(3, 1)), "b": jnp.asarray(normal(1, 4))}

    def losses(p, x):
        merged = jax.tree.map(lambda x: x, p["base"])
        merged["layers_0"]["kernel"] += p["low"]["a"] @ p["low"]["b"]
        return squares(module.apply({"params": merged}, x))

    layers = assert_gradients(losses, {"base": base, "low": low}, X, rtol=1e-10)
    assert {layer.kernel for layer in layers} == {
        "base/layers_0/kernel",
        "base/layers_2/kernel",
        "base/layers_0/bias",
        "low/a",
        "low/b",
    }


def test_in_a_layer_that_is_recomputed(x64):
    """Under `jax.checkpoint` the kernel is made inside, as an adapter is."""

    def model(p, x):
        layer = jax.checkpoint(lambda p, x: jnp.tanh(x @ (p["w"] + p["down"] @ p["up"]) + p["b"]))
        return layer(p, x)

    layers = assert_gradients(lambda p, x: squares(model(p, x)), LOW_RANK, X, rtol=1e-10)
    assert len(layers) == 4


def test_kernels_that_are_rounded_stay_as_they_are():
    """To integers, where a sum of rounded parts is not the rounded sum; so do integers as inputs."""
    params = jax.tree.map(jnp.asarray, {"w": normal(3, 4), "v": normal(4, 2)})
    counts = jnp.arange(15).reshape(N, 3)

    def rounded(p, x):
        return x @ (3 * p["w"] + p["w"]).astype(int).astype(float) @ p["v"]

    def counted(p, x):
        product = jax.lax.dot_general(
            counts + 0 * x.astype(int), 0.5 * p["w"], (((1,), (0,)), ((), ()))
        )
        return product @ p["v"]

    for model in (rounded, counted):
        closed = jax.make_jaxpr(model)(params, jnp.asarray(X))
        assert distributed(closed, len(params)) is closed


def test_the_value_is_the_same_and_other_programs_are_handed_back():
    """A kernel that depends on data, or sums of activations, are left alone."""

    def plain(p, x):
        hidden = x @ p["w"] + p["b"]
        return (hidden + hidden**2) @ (p["up"] * hidden.sum()).T

    params = jax.tree.map(jnp.asarray, LOW_RANK)
    closed = jax.make_jaxpr(plain)(params, X)
    assert distributed(closed, len(params)) is closed
    closed = jax.make_jaxpr(adapted)(params, X)
    new = distributed(closed, len(params))
    assert new is not closed
    (got,) = jax.jit(jax.extend.core.jaxpr_as_fun(new))(*jax.tree.leaves(params), jnp.asarray(X))
    np.testing.assert_allclose(got, adapted(params, X), rtol=1e-5, atol=1e-6)


def test_a_token_beside_no_rows():
    """Data without rows says nothing of the examples: the token stays what it is."""

    def model(p, x):
        front = jnp.broadcast_to(p["front"], (N, 2, 3))
        rows = jnp.concatenate([front, x[:, None][:, :0]], 1)
        return rows.sum(1) * x @ p["w"]

    params = {"front": jnp.asarray(normal(1, 1, 3)), "w": jnp.asarray(normal(3, 2))}
    layers = ko.ggn(lambda p, x: ko.Normal(model(p, x))).layers(params, X)
    assert [layer.path for layer in layers] == ["w"]
    assert [u.path for u in layers.uncovered] == ["front"]


def in_a_scan(layer):
    """The layer in the only step of a scan, its weights constants of that."""

    def model(v, norm, x):
        return jax.lax.scan(lambda h, _: (layer(v, norm, h), None), x, None, length=1)[0]

    return model


@pytest.mark.parametrize("call", [lambda layer: layer, jax.jit, jax.checkpoint, in_a_scan])
def test_what_is_not_linear_in_a_parameter_is_named(call):
    """A masked weight, one of norm one: no sum of products with it, wherever the norm is taken."""
    normalised = call(lambda v, norm, x: x @ (v / norm))

    def model(p, x):
        hidden = normalised(p["unit"], jnp.linalg.norm(p["unit"]), x)
        return hidden @ (p["masked"] * np.tri(3)) @ p["plain"]

    params = {name: jnp.asarray(normal(3, 3)) for name in ("masked", "unit", "plain")}
    layers = ko.ggn(lambda p, x: ko.Normal(model(p, x))).layers(params, X)
    assert [layer.path for layer in layers] == ["plain"]
    assert {u.path: "outside any supported layer" in u.reason for u in layers.uncovered} == {
        "masked": True,
        "unit": True,
    }
