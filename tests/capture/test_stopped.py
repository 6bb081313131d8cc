"""Uses that no derivative comes back to are none: targets, fixed points, choices of the largest."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import oracles

N = 5
X = np.random.default_rng(0).normal(size=(N, 3))
PARAMS = {name: np.random.default_rng(i).normal(size=(3, 3)) for i, name in enumerate("wv")}
stop = jax.lax.stop_gradient


def net(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def target(p, x):
    """The same network behind a stopped gradient, in a call of its own."""
    return net(p, x) - stop(jax.jit(net)(p, x[:, ::-1]))


def tapped(p, x):
    layer = lambda x: jnp.tanh(ko.tap_dense(x @ p["w"], x, p["w"]))
    return layer(x) @ p["v"] - stop(jax.checkpoint(layer)(x[:, ::-1]) @ p["v"])


def fixed_point(p, x):
    """One step behind ten that are not derived: a deep equilibrium model."""
    step = lambda z: jnp.tanh(z @ p["w"] / 9 + x)
    z = stop(jax.lax.fori_loop(0, 10, lambda _, z: step(z), x))
    return step(z) @ p["v"]


def choice(p, x):
    largest = jnp.argmax(x[:, ::-1] @ p["w"], -1)
    return net(p, x) * (1.0 + largest[:, None])


def without(model):
    """The model with what no derivative comes back to as constants."""
    p = jax.tree.map(jnp.asarray, PARAMS)
    match model.__name__:
        case "fixed_point":
            z = x = jnp.asarray(X)
            for _ in range(10):
                z = jnp.tanh(z @ p["w"] / 9 + x)
            # rows of data, not of a constant that all examples share
            return lambda p, x: jnp.tanh((z + 0 * x) @ p["w"] / 9 + x) @ p["v"]
        case "choice":
            largest = jnp.argmax(X[:, ::-1] @ p["w"], -1)
            return lambda p, x: net(p, x) * (1.0 + largest[:, None])
        case _:
            return net


@pytest.mark.parametrize("model", [target, tapped, fixed_point, choice])
def test_statistics_are_those_of_what_is_derived(x64, model):
    params = jax.tree.map(jnp.asarray, PARAMS)

    def measured(predict):
        estimator = ko.ggn(lambda p, x: ko.Normal(predict(p, x)))
        layers = estimator.layers(params, X)
        assert [(x.path, x.uses, x.rows, x.notes) for x in layers] == [
            ("w", 1, N, ()),
            ("v", 1, N, ()),
        ]
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")
        return jax.jit(lambda p: estimator.at(p, X).statistics(oracles.plan(layers))[0])(params)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    jax.tree.map(close, measured(model), measured(without(model)))


def test_modules_behind_a_stopped_gradient_are_no_uses():
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), jnp.float32(X))["params"]
    of = lambda p, x: model.apply({"params": p}, x)
    estimator = ko.ggn(lambda p, x: ko.Normal(of(p, x) - stop(of(p, -x))))
    (layer,) = estimator.layers(params, X)
    assert (layer.kernel, layer.bias, layer.uses, layer.rows) == ("kernel", "bias", 1, N)


def test_a_parameter_of_a_choice_alone_is_named():
    params = jax.tree.map(jnp.float32, PARAMS) | {"u": jnp.ones((3, 2))}
    predict = lambda p, x: ko.Normal(net(p, x) * jnp.argmax(x @ p["u"], -1)[:, None])
    layers = ko.ggn(predict).layers(params, X)
    assert [layer.path for layer in layers] == ["w", "v"]
    (left,) = layers.uncovered
    assert (left.path, left.reason[:30]) == ("u", "only used behind stop_gradient")
