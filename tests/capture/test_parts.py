"""Layers that share out one stored parameter: slices of kernels and of biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Part
from kfac_optax.capture.ownership import apart
from kfac_optax.estimators.row_squares import mean_squares
from tests import oracles
from tests.layers.gradients import assert_gradients, squares

N = 5


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


def attention(q, k, v, x):
    """Three layers `(w, b)` of one input."""
    apply = lambda layer: x @ layer["w"] + layer["b"]
    return jnp.tanh(apply(q)) * apply(k) + apply(v)


def fused(p, x):
    w, b = jnp.split(p["w"], 3, 1), jnp.split(p["b"], 3)
    return attention(*({"w": w[i], "b": b[i]} for i in range(3)), x)


def unrolled(p, x):
    """Layers stored as one stack, run one after another."""
    for i in range(2):
        x = jnp.tanh(x @ p["w"][i] + p["b"][i])
    return x


def blocks(p, x):
    """Half of the inputs to half of the outputs each, and the scale of a part."""
    half = p["scale"][2:] * jnp.sin(x[:, 2:])
    return jnp.concatenate([x[:, :2] @ p["w"][:2, :3], half @ p["w"][2:, 3:]], 1)


def convolved(p, x):
    for kernel in (p["w"][0], p["w"][1]):
        x = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=AXES)
    return x


def scanned(p, x):
    """The axis of the stack is scanned over, that of the outputs is cut."""

    def step(h, w):
        return jnp.tanh(h @ w[:, :3]) * jax.nn.sigmoid(jnp.sin(h) @ w[:, 3:]), None

    return jax.lax.scan(step, x, p["w"])[0]


def transposed(p, x):
    """Cut twice, behind a transposition, inside a call."""
    return jax.jit(lambda w: jnp.tanh(x @ w) @ w.T)(p["w"].T[:, 1:][:, :2])


def scanned_and_unrolled(p, x):
    """A part inside of a scan over the leaf, where it has an axis less, and one outside."""
    hidden = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"][:, :, :3])[0]
    return hidden @ p["w"][0, :, 3:]


def with_an_axis_left(p, x):
    """The axis of the stack is kept, and an einsum sums over it."""
    hidden = jnp.tanh(jnp.einsum("nd,ldk->nk", x, p["w"][:1]))
    return jnp.einsum("nd,ldk->nk", hidden, p["w"][1:]) + jnp.sin(x) @ p["w"][0]


def with_empty_slices(p, x):
    """As of a list of widths one of which is zero."""
    return jnp.concatenate([x @ p["w"][:, :0], x @ p["w"][:, :2], x @ p["w"][:, 2:]], 1)


AXES = ("NWC", "WIO", "NWC")
X = normal(N, 3)
FUSED = {"w": normal(3, 6), "b": normal(6)}
STACK = {"w": normal(2, 3, 3), "b": normal(2, 3)}
MODELS = {
    "fused": (fused, FUSED, X, ["w[:, 0:2]", "w[:, 2:4]", "w[:, 4:6]"]),
    "unrolled": (unrolled, STACK, X, ["w[0]", "w[1]"]),
    "blocks": (
        blocks,
        {"w": normal(4, 6), "scale": normal(4)},
        normal(N, 4),
        ["scale", "w[0:2, 0:3]", "w[2:4, 3:6]"],
    ),
    "convolved": (convolved, {"w": normal(2, 3, 2, 2)}, normal(N, 4, 2), ["w[0]", "w[1]"]),
    "scanned": (scanned, {"w": normal(2, 3, 6)}, X, ["w[:, 0:3]", "w[:, 3:6]"]),
    "scanned and unrolled": (
        scanned_and_unrolled,
        {"w": normal(2, 3, 6)},
        X,
        ["w[:, 0:3]", "w[0, :, 3:6]"],
    ),
    "with an axis left": (with_an_axis_left, {"w": normal(2, 3, 3)}, X, ["w[0]", "w[1]"]),
    "with empty slices": (with_empty_slices, {"w": normal(3, 4)}, X, ["w[:, 0:2]", "w[:, 2:4]"]),
    "transposed": (transposed, {"w": normal(4, 3)}, X, ["w"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_part_is_a_layer_and_gives_its_own_gradient_back(x64, name):
    model, params, x, paths = MODELS[name]
    layers = assert_gradients(lambda p, x: squares(model(p, x)), params, x, rtol=1e-10)
    assert [layer.path for layer in layers] == paths
    assert not any(layer.partly for layer in layers)


def apart_fused(p, x):
    return attention(p["q"], p["k"], p["v"], x)


def apart_unrolled(p, x):
    for layer in p:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x


PAIRS = {
    "fused": (
        fused,
        FUSED,
        apart_fused,
        lambda p: {
            name: {"w": p["w"][:, 2 * i : 2 * i + 2], "b": p["b"][2 * i : 2 * i + 2]}
            for i, name in enumerate("qkv")
        },
    ),
    "unrolled": (
        unrolled,
        STACK,
        apart_unrolled,
        lambda p: [{"w": p["w"][i], "b": p["b"][i]} for i in range(2)],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_an_update_is_that_of_layers_stored_apart(x64, name):
    """With a coarse level, whose rows are the parts."""
    together, params, separate, split = PAIRS[name]

    def update(model, params):
        estimator = ko.ggn(lambda p, x: ko.Normal(model(p, x)))
        layers = estimator.layers(params, X)
        tx = ko.kfac_two_level(layers, learning_rate=0.1, damping=0.01)

        @jax.jit
        def step(params):
            gradient = jax.grad(lambda p: squares(model(p, X)).mean())(params)
            at = estimator.at(params, X)
            return tx.update(gradient, tx.init(params), params, curvature=at)[0]

        return step(params)

    params = jax.tree.map(jnp.asarray, params)
    got, want = split(update(together, params)), update(separate, split(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, want)


def test_products_of_parts_are_exact(x64):
    """The curvature's block of a part, column by column, against the Jacobian."""
    estimator = ko.ggn(lambda p, x: ko.Normal(unrolled(p, x)))
    params = {"w": jnp.asarray(normal(2, 3, 3)[..., :2, :2]), "b": jnp.asarray(normal(2, 2))}
    layer = estimator.layers(params, X[:, :2]).layers[1]
    jacobian = jax.jit(jax.jacobian(unrolled))(params, X[:, :2])
    rows = jnp.concatenate([jacobian["w"][:, :, 1], jacobian["b"][:, :, 1:]], 2)
    rows = rows.reshape(-1, 6)
    got = oracles.dense_block(estimator, params, (X[:, :2],), layer)
    np.testing.assert_allclose(got, rows.T @ rows / N, rtol=1e-10, atol=1e-12)


def test_squares_of_parts_are_those_of_the_examples_gradients(x64):
    """Entry by entry; what nothing uses has none."""

    def losses(p, x):
        return squares(fused(p, x) + x @ p["idle"][:, :2])

    params = jax.tree.map(jnp.asarray, FUSED | {"idle": normal(3, 4)})
    estimator = ko.empirical_fisher(losses)
    layers = estimator.layers(params, X)
    rows = estimator.at(params, X).rows(layers.layers)
    got = mean_squares(rows, params)
    jacobian = jax.jit(jax.jacobian(losses))(params, X)
    for name, x in jacobian.items():
        np.testing.assert_allclose(got[name], jnp.square(x).mean(0), rtol=1e-10, atol=1e-14)
    assert not got["idle"][:, 2:].any()


def test_what_a_part_leaves_over_passes(x64):
    """Numbers that nothing uses have no gradient, and others are named."""

    def model(p, x):
        return x @ p["idle"][:, :2] + x @ p["partly"][:, :2] * jnp.exp(p["partly"][0, 2])

    params = {"idle": jnp.asarray(normal(3, 4)), "partly": jnp.asarray(normal(3, 4))}
    estimator = ko.ggn(lambda p, x: ko.Normal(model(p, x)))
    layers = estimator.layers(params, X)
    assert [layer.notes for layer in layers] == [(), ("partly also used by exp: not measured",)]
    tx = ko.kfac(layers, learning_rate=0.1, kl_clip=None, uncovered="pass")

    @jax.jit
    def step(params):
        gradient = jax.grad(lambda p: squares(model(p, X)).mean())(params)
        at = estimator.at(params, X)
        return gradient, tx.update(gradient, tx.init(params), params, curvature=at)[0]

    gradient, updates = step(params)
    for name in params:
        np.testing.assert_array_equal(updates[name][:, 2:], gradient[name][:, 2:])
    assert not np.allclose(updates["idle"][:, :2], gradient["idle"][:, :2])


def test_parts_that_overlap_are_not_two_layers():
    """The whole parameter comes first, then what is used first."""
    models = {
        ("w",): lambda p, x: x @ p["w"] + jnp.pad(x @ p["w"][:, :2], ((0, 0), (0, 2))),
        ("w[:, 0:2]", "w[:, 2:4]"): lambda p, x: jnp.concatenate(
            [x @ p["w"][:, :2], x @ p["w"][:, 1:3], x @ p["w"][:, 2:]], 1
        ),
    }
    for paths, model in models.items():
        layers = ko.ggn(lambda p, x, f=model: ko.Normal(f(p, x))).layers({"w": normal(3, 4)}, X)
        assert tuple(layer.path for layer in layers) == paths
        assert all("w also used by dot_general" in layer.notes[0] for layer in layers)


def test_apart_keeps_weights_before_scales():
    def part(start, stop):
        return Part((4, 3), (start, 0), (stop - start, 3))

    groups = {(0, part(0, 1)): "scale", (0, part(1, 4)): "weight", (1, None): "other"}
    scales = {key: name == "scale" for key, name in groups.items()}
    assert list(apart(groups, scales).values()) == ["weight", "other"]
    assert str(part(1, 4)) == "[1:4]" and str(part(2, 3)) == "[2]"
