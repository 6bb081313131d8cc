"""Checks of parameters that are divided over devices, run by `test_many_devices.py`."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from tests import helpers as h

EXAMPLES = 8


def parameters():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "up": {"w": jax.random.normal(keys[0], (4, 8)) / 2, "b": jnp.full(8, 0.1, jnp.float32)},
        "down": {"w": jax.random.normal(keys[1], (8, 4)) / 2, "b": jnp.full(4, 0.1, jnp.float32)},
    }, jax.random.normal(keys[2], (EXAMPLES, 4))


def plain(params, x):
    x = jnp.tanh(h.dense(x, params["up"]["w"], params["up"]["b"]))
    return ko.Categorical(h.dense(x, params["down"]["w"], params["down"]["b"]))


def columns(params, x):
    """Tensor parallel: the first weight split by columns, the second by rows."""
    up, down = params["up"], params["down"]
    x = jnp.tanh(ko.tap_dense(x @ up["w"] + up["b"], x, up["w"], up["b"]))
    s = jnp.einsum("ni,ij->nj", x, down["w"], out_sharding=P("data", None)) + down["b"]
    return ko.Categorical(ko.tap_dense(s, x, down["w"], down["b"]))


def rows(params, x):
    """FSDP: every weight split over the devices of the batch, and collected where it is used."""
    for name in ("up", "down"):
        w, b = params[name]["w"], params[name]["b"]
        s = x @ jax.sharding.reshard(w, P()) + jax.sharding.reshard(b, P())
        s = ko.tap_dense(s, x, w, b)
        x = jnp.tanh(s) if name == "up" else s
    return ko.Categorical(x)


def train(tx, estimator, params, state, x, count=3):
    """Parameters and state after some steps of the traced schedule, one compiled function."""

    @jax.jit
    def step(params, state, x):
        curvature = estimator.at(params, x)
        updates, state = tx.update(
            jax.tree.map(jnp.cos, params), state, params, curvature=curvature
        )
        return optax.apply_updates(params, updates), state

    for _ in range(count):
        params, state = step(params, state, x)
    return params, state


def make(layers, **words):
    short = {"curvature_every": 2, "inverse_every": 2}
    tx = ko.kfac_two_level(layers, learning_rate=0.1, damping=0.05, **short, **words)
    return optax.chain(tx, optax.sgd(0.1, momentum=0.9))


def explicit_parameters():
    """Weights split over explicit axes: the numbers of one device, and a state that stays."""
    params, x = parameters()
    layers = ko.ggn(plain).layers(params, x)
    tx = make(layers)
    expected = jax.device_get(train(tx, ko.ggn(plain), params, tx.init(params), x)[0])
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    by_columns = {
        "up": {"w": P(None, "model"), "b": P("model")},
        "down": {"w": P("model", None), "b": P()},
    }
    by_rows = jax.tree.map(lambda _: P("data"), params)
    for predict, specs in ((columns, by_columns), (rows, by_rows)):
        with jax.set_mesh(mesh):
            placed = jax.tree.map(jax.device_put, params, specs)
            shardings = ko.state_shardings(tx, placed)
            state = jax.jit(tx.init, out_shardings=shardings)(placed)
            batch = jax.device_put(x, P("data"))
            got, after = train(tx, ko.ggn(predict), placed, state, batch)
            h.assert_close(jax.device_get(got), expected)
            h.assert_same_types(after, state)
            h.assert_same_types(got, placed)


CHECKS = {check.__name__: check for check in (explicit_parameters,)}
