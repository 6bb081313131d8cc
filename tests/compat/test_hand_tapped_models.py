"""Models tapped by hand: Equinox with per-example vmap, modules of closures; and boxed linen
parameters.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

import kfac_optax as ko
from tests import helpers as h


class Linear(eqx.Module):
    """Equinox's convention: `weight [out, in]`, called on one example."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        s = self.weight @ x + self.bias
        return ko.tap_dense(s, x, self.weight.T, self.bias)


class EquinoxMLP(eqx.Module):
    layers: list
    activation: callable = eqx.field(static=True)

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def test_equinox():
    """Factors and updates are those of the same model in plain JAX, weights transposed."""
    plain = h.plain_problem()
    model = EquinoxMLP([Linear(v["w"].T, v["b"]) for v in plain.params.values()], jnp.tanh)
    params, static = eqx.partition(model, eqx.is_array)

    def predict(params, x):
        return ko.Categorical(jax.vmap(eqx.combine(params, static))(x))

    problem = h.make_problem(predict, params, plain.x, plain.y)
    assert [(x.kernel, x.bias, x.layout.order == (1, 0)) for x in problem.layers] == [
        ("layers/0/weight", "layers/0/bias", True),
        ("layers/1/weight", "layers/1/bias", True),
    ]
    final, state, updates = h.run(h.make_tx("kfac_two_level", problem), problem, 6)
    expected_params, expected_state, expected = h.reference_run("kfac_two_level")

    def as_plain(tree):
        return {
            name: {"w": jnp.swapaxes(layer.weight, -1, -2), "b": layer.bias}
            for name, layer in zip(("first", "last"), tree.layers, strict=True)
        }

    h.assert_close(as_plain(updates), expected)
    h.assert_close(as_plain(final), expected_params)
    h.assert_close(optax.tree.get(state, "factors"), optax.tree.get(expected_state, "factors"))


def test_equinox_filter_jit_step():
    """The usual Equinox loop: `filter_jit` and `apply_updates`, state from
    `filter(model, is_array)`.
    """
    plain = h.plain_problem()
    model = EquinoxMLP([Linear(v["w"].T, v["b"]) for v in plain.params.values()], jnp.tanh)
    estimator = ko.ggn(lambda model, x: ko.Categorical(jax.vmap(model)(x)))
    layers = estimator.layers(model, plain.x)
    tx = optax.chain(
        ko.kfac(layers, learning_rate=0.1, damping=0.05, curvature_every=2, inverse_every=3),
        optax.sgd(0.1),
    )
    state = jax.jit(tx.init)(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda m: ko.Categorical(jax.vmap(m)(plain.x)).mean_nll(plain.y))(
            model
        )
        updates, state = tx.update(grads, state, model, curvature=estimator.at(model, plain.x))
        return eqx.apply_updates(model, updates), state

    for _ in range(2):
        model, state = step(model, state)
    _, _, expected = h.reference_run("kfac")
    moved = jax.tree.map(lambda p, u: p - 0.1 * (u[0] + u[1]), plain.params, expected)
    h.assert_close(model.layers[0].weight.T, moved["first"]["w"])
    h.assert_close(model.layers[1].bias, moved["last"]["b"])


def _transform(function):
    """Haiku's shape in ten lines: `(init, apply)` over a flat dict of modules,
    `{"mlp/~/linear_0": {"w", "b"}}`.
    """

    def init(key, x):
        params = {}

        def linear(name, x, size):
            nonlocal key
            key, mine = jax.random.split(key)
            params[name] = {
                "w": 0.5 * jax.random.normal(mine, (x.shape[-1], size)),
                "b": jnp.zeros(size),
            }
            return x @ params[name]["w"] + params[name]["b"]

        function(linear, x)
        return params

    def apply(params, x):
        return function(lambda name, x, size: h.dense(x, params[name]["w"], params[name]["b"]), x)

    return init, apply


def test_modules_of_closures():
    """Haiku-like parameters, with slashes in their names, through the whole of training."""
    init, apply = _transform(
        lambda linear, x: linear(
            "mlp/~/linear_1", jnp.tanh(linear("mlp/~/linear_0", x, 4)), h.CLASSES
        )
    )
    plain = h.plain_problem()
    params = init(jax.random.key(0), plain.x)
    params |= dict(zip(params, plain.params.values(), strict=True))
    problem = h.make_problem(lambda p, x: ko.Categorical(apply(p, x)), params, plain.x, plain.y)
    assert [layer.path for layer in problem.layers] == ["mlp/~/linear_0", "mlp/~/linear_1"]
    _, state, updates = h.run(h.make_tx("kfac_two_level", problem), problem, 6)
    _, _, expected = h.reference_run("kfac_two_level")
    h.assert_close(list(updates.values()), list(expected.values()))
    assert ko.coarse_fisher(state).names == ("mlp/~/linear_0", "mlp/~/linear_1")


class _Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.tanh(nn.Dense(4, kernel_init=init)(x))
        return nn.Dense(h.CLASSES, kernel_init=init)(x)


def test_partitioned_linen_parameters():
    """Boxes of `nn.with_partitioning` change no path, no layer and no value, and come back around
    the updates.
    """
    plain = h.plain_problem()
    model = _Partitioned()
    boxed = jax.jit(model.init)(jax.random.key(0), plain.x)["params"]
    values = {
        f"Dense_{i}": {"kernel": v["w"], "bias": v["b"]}
        for i, v in enumerate(plain.params.values())
    }
    boxed = jax.tree.map(
        lambda box, value: (
            box.replace_boxed(value) if isinstance(box, meta.AxisMetadata) else value
        ),
        boxed,
        values,
        is_leaf=lambda x: isinstance(x, meta.AxisMetadata),
    )
    problem = h.make_problem(
        lambda p, x: ko.Categorical(model.apply({"params": p}, x)), boxed, plain.x, plain.y
    )
    assert [layer.kernel for layer in problem.layers] == ["Dense_0/kernel", "Dense_1/kernel"]
    _, _, updates = h.run(h.make_tx("kfac_two_level", problem), problem, 6)
    assert isinstance(updates["Dense_0"]["kernel"], nn.Partitioned)
    _, _, expected = h.reference_run("kfac_two_level")
    unboxed = meta.unbox(updates)
    h.assert_close(
        {
            k: {"w": u["kernel"], "b": u["bias"]}
            for k, u in zip(expected, unboxed.values(), strict=True)
        },
        expected,
    )
    np.testing.assert_array_equal(updates["Dense_0"]["kernel"].names, (None, "model"))
