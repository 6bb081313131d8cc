"""Whole updates of every preset of the catalogue on eight devices, run by `test_many_devices.py`."""

import inspect

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from tests import helpers as h

DEVICES, EXAMPLES, STEPS = 8, 16, 3
RATE = 0.1
# a row for each example and each of three outputs
ROWS = {"skfac": {"rows": 3 * EXAMPLES}}
# one of each family, which the fast run has; the rest is slow
FAMILIES = (
    "kfac",
    "kfac_two_level",
    "ekfac",
    "rs_kfac",
    "foof",
    "eva",
    "spring",
    "singd",
    "skfac",
    "mkor",
    "shampoo",
    "soap",
)


def predict(params, x):
    """Two layers of one shape, which one batched call serves."""
    return ko.Normal(h.dense(jnp.tanh(h.dense(x, params["a"])), params["b"]))


def losses(params, x, y):
    return predict(params, x).nll(y)


def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {name: jax.random.normal(key, (3, 3)) / 2 for name, key in zip("ab", keys)}
    return params, tuple(jax.random.normal(key, (EXAMPLES, 3)) for key in keys[2:])


def asks(name):
    """Whether a preset wants to know over which axis the batch is split."""
    return "axis_name" in inspect.signature(getattr(ko, name)).parameters


def built(name, axis_name):
    """The record's own build, told over which axis the batch is split if it asks."""
    params, (x, _) = problem()
    layers, record = ko.ggn(predict).layers(params, x), ko.CATALOGUE[name]
    words = {"axis_name": axis_name} if asks(name) else {}
    return record.build(layers, **ROWS.get(name, {}), **words)


def step(name, axis_name, params, state, x, y):
    """An update of one preset, and the state behind it; a device has its part of the batch."""

    def loss(params):
        return predict(params, x).mean_nll(y)

    def whole(params):
        return loss(params) if axis_name is None else jax.lax.pmean(loss(params), axis_name)

    gradient = jax.grad(whole)(params)
    curvature = ko.ggn(predict).at(params, x)
    if "losses" in ko.CATALOGUE[name].needs:
        curvature = ko.empirical_fisher(losses).at(params, x, y)
    # who does not know of devices is given the loss of the whole batch
    value_fn = loss if asks(name) else whole
    given = {"curvature": curvature, "value": value_fn(params), "value_fn": value_fn}
    # one example, whose labels are those of the data
    given["sampled_grads"] = jax.tree.map(lambda g: g[None], gradient)
    return built(name, axis_name).update(gradient, state, params, **given)


def run(names, states, axis_name):
    """Updates of three steps by preset: one compiled program for all of them."""
    start, batch = problem()
    params = dict.fromkeys(names, start)

    def together(params, states, x, y):
        moved, updates, after = {}, {}, {}
        for name in names:
            updates[name], after[name] = step(name, axis_name, params[name], states[name], x, y)
            move = lambda p, u: p - RATE * u
            moved[name] = jax.tree.map(move, params[name], updates[name])
        return updates, moved, after

    if axis_name is not None:
        mesh = jax.make_mesh((DEVICES,), (axis_name,), axis_types=(AxisType.Auto,))
        split = P(axis_name)
        specs = (P(), P(), split, split)
        together = jax.shard_map(together, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)
        # where the step leaves them, so that it is compiled once
        params, states = jax.device_put((params, states), NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, split))
    together, found = jax.jit(together), []
    for _ in range(STEPS):
        updates, params, states = together(params, states, *batch)
        found.append(updates)
    return jax.device_get(found)


def presets(names=FAMILIES):
    """Three whole updates on a split batch, with every branch that short periods have in them, are
    those of one device; in double precision, since roots of gradients amplify rounding.
    """
    with jax.enable_x64(True):
        params, _ = problem()
        states = jax.jit(lambda: {name: built(name, None).init(params) for name in names})()
        expected = run(names, states, None)
        h.assert_close(run(names, states, "data"), expected, rtol=1e-6, atol=1e-7)
        assert all(x.dtype == "float64" for x in jax.tree.leaves(expected))


def other_presets():
    """The same for all the others, a few in one program."""
    others = [name for name in ko.CATALOGUE if name not in FAMILIES]
    for start in range(0, len(others), 9):
        presets(others[start : start + 9])


CHECKS = {check.__name__: check for check in (presets, other_presets)}
