"""Checks on eight CPU devices, each run by `test_many_devices.py` in a process of its own: `python -m ... NAME`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from tests import helpers as h

DEVICES, EXAMPLES = 8, 16


def _data():
    x = jax.random.normal(jax.random.key(3), (EXAMPLES, 4))
    # two devices have padding only, the others one or two examples of different weight
    weights = jnp.array([0, 0, 1, 0, 0.5, 1, 1, 1, 0, 2, 1, 1, 0, 0, 3, 1], jnp.float32)
    return x, jnp.arange(EXAMPLES) % 3, weights


def _weighted(params, x, weights):
    return ko.Categorical(h.plain_predict(params, x).logits, weights=weights)


def _per_example(params, x, weights):
    """The same model written for one example and vectorised, as Equinox users do."""
    return ko.Categorical(jax.vmap(lambda row: h.plain_predict(params, row).logits)(x), weights=weights)


def _expected(tx, estimator, *batch):
    """Updates and state of one step on one device; any gradient will do, so the parameters serve."""
    params = h.plain_params()
    return jax.device_get(_step(tx, estimator)(params, jax.jit(tx.init)(params), *batch))


def _step(tx, estimator, key=None):
    @jax.jit
    def step(params, state, *batch):
        return tx.update(params, state, params, curvature=estimator.at(params, *batch, key=key), refresh=True)

    return step


def _same(result, expected):
    h.assert_close(jax.device_get(result), expected)


def _transformations(estimator, *batch, **settings):
    layers = estimator.layers(h.plain_params(), *batch)
    settings = {"learning_rate": 0.1, "damping": 0.05} | settings
    return [
        ko.kfac(layers, **settings),
        ko.kfac_two_level(layers, **settings),
        ko.kfac_two_level(layers, coarse="exact", **settings),
    ]


def auto_axes():
    """`jit` with a batch sharded over automatic axes: the numbers of one device, nothing asked of the user."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, _, weights = _data()
    estimator = ko.ggn(_weighted)
    for tx in _transformations(estimator, x, weights)[:2]:
        params = jax.device_put(h.plain_params(), whole)
        state = jax.jit(tx.init, out_shardings=whole)(params)
        step = _step(tx, estimator)
        updates, after = step(params, state, *jax.device_put((x, weights), split))
        _same((updates, after), _expected(tx, estimator, x, weights))
        shardings = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), after, state)
        assert all(jax.tree.leaves(shardings))
        step(params, after, *jax.device_put((x, weights), split))
        assert step._cache_size() == 1


def auto_axes_sharded_parameters():
    """Kernels split over a model axis, the batch over a data axis, both automatic."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, _, weights = _data()
    estimator = ko.ggn(_weighted)
    tx = _transformations(estimator, x, weights)[1]
    specs = jax.tree.map(
        lambda p: NamedSharding(mesh, P(None, "model") if p.ndim == 2 else P("model")), h.plain_params()
    )
    params = jax.device_put(h.plain_params(), specs)
    assert not params["first"]["w"].sharding.is_fully_replicated
    state = jax.jit(tx.init)(params)
    updates, after = _step(tx, estimator)(params, state, *jax.device_put((x, weights), NamedSharding(mesh, P("data"))))
    _same((updates, after), _expected(tx, estimator, x, weights))
    h.assert_same_types(after, state)


def explicit_axes():
    """`jax.make_mesh` makes explicit axes now: same numbers, and the types of the state never change."""
    mesh = jax.make_mesh((DEVICES,), ("data",))
    assert mesh.axis_types == (AxisType.Explicit,)
    x, _, weights = _data()
    for predict in (_weighted, _per_example):
        estimator = ko.ggn(predict)
        chosen = _transformations(estimator, x, weights)
        for tx in chosen if predict is _weighted else chosen[1:2]:
            expected = _expected(tx, estimator, x, weights)
            with jax.set_mesh(mesh):
                params = jax.device_put(h.plain_params(), P())
                batch = jax.device_put((x, weights), P("data"))
                assert jax.typeof(batch[0]).sharding.spec == P("data", None)
                state = tx.init(params)
                updates, after = _step(tx, estimator)(params, state, *batch)
                _same((updates, after), expected)
                h.assert_same_types(after, state)
                h.assert_same_types(jax.jit(tx.init)(params), state)
                h.assert_same_types(updates, params)


def explicit_axes_sampled_labels():
    """The sampled Fisher on explicit axes, with the traced schedule and a real gradient."""
    mesh = jax.make_mesh((DEVICES,), ("data",))
    x, y, weights = _data()
    estimator = ko.fisher(_weighted)
    tx = _transformations(estimator, x, weights)[1]

    @jax.jit
    def step(params, state, x, y, weights, key):
        grads = jax.grad(lambda p: _mean(h.plain_predict(p, x).nll(y)))(params)
        return tx.update(grads, state, params, curvature=estimator.at(params, x, weights, key=key))

    key = jax.random.key(5)
    expected = jax.device_get(step(h.plain_params(), jax.jit(tx.init)(h.plain_params()), x, y, weights, key))
    with jax.set_mesh(mesh):
        params = jax.device_put(h.plain_params(), P())
        state = tx.init(params)
        updates, after = step(params, state, *jax.device_put((x, y, weights), P("data")), key)
        _same((updates, after), expected)
        h.assert_same_types(after, state)


def _mean(nll):
    return jnp.sum(nll) / EXAMPLES


def shard_map():
    """`axis_name=` inside `shard_map` that checks varying axes: exact also where devices have different weights."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x, _, weights = _data()
    for predict in (_weighted, _per_example):
        estimator = ko.ggn(predict)
        chosen = list(
            zip(
                _transformations(estimator, x, weights, axis_name="data"),
                _transformations(estimator, x, weights),
                strict=True,
            )
        )
        for tx, single in chosen if predict is _weighted else chosen[1:2]:
            params = h.plain_params()
            step = jax.shard_map(
                _step(tx, estimator),
                mesh=mesh,
                in_specs=(P(), P(), P("data"), P("data")),
                out_specs=P(),
                check_vma=True,
            )
            result = jax.jit(step)(params, jax.jit(tx.init)(params), x, weights)
            _same(result, _expected(single, estimator, x, weights))


def shard_map_schedule():
    """The traced schedule and a real gradient, three steps; the branches agree about what varies."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x, y, _ = _data()
    problem = h.make_problem(h.plain_predict, h.plain_params(), x, y)
    tx, single = h.make_tx("kfac_two_level", problem, axis_name="data"), h.make_tx("kfac_two_level", problem)

    def train(params, x, y):
        state = tx.init(params)
        for _ in range(3):
            grads = jax.grad(lambda p: jax.lax.pmean(problem.loss(p, x, y), "data"))(params)
            updates, state = tx.update(grads, state, params, curvature=problem.estimator.at(params, x))
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return params, state

    sharded = jax.shard_map(train, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=True)
    params, state, _ = h.run(single, problem, 3)
    _same(jax.jit(sharded)(problem.params, x, y), jax.device_get((params, state)))


def shard_map_sampled_labels():
    """Every device draws labels of its own: the factor is the mean of the devices' with folded keys."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.tile(jax.random.normal(jax.random.key(3), (1, 4)), (EXAMPLES, 1))  # all devices see the same
    estimator, key, params = ko.fisher(h.plain_predict), jax.random.key(11), h.plain_params()
    layers = estimator.layers(params, x)
    tx = ko.kfac(layers, learning_rate=0.1, axis_name="data")
    step = jax.shard_map(
        _step(tx, estimator, key), mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=True
    )
    state = jax.jit(tx.init)(params)
    (factors,) = optax.tree.get(jax.jit(step)(params, state, x)[1], "factors").values()

    single = ko.kfac(layers, learning_rate=0.1)
    local = jax.jit(
        lambda key, x: single.update(params, state, params, curvature=estimator.at(params, x, key=key), refresh=False)[
            1
        ]
    )
    parts = [local(jax.random.fold_in(key, i), x[:2]) for i in range(DEVICES)]
    outputs = np.mean([optax.tree.get(part, "factors")["dense_5x4_bias"].outputs for part in parts], 0)
    np.testing.assert_allclose(factors.outputs, outputs, rtol=1e-4, atol=1e-6)
    common = optax.tree.get(local(key, x[:2]), "factors")["dense_5x4_bias"].outputs
    assert not np.allclose(factors.outputs, common, rtol=1e-2)


def pmap():
    """`pmap` with `axis_name=`, the batch with a leading device axis."""
    x, _, weights = _data()
    estimator = ko.ggn(_weighted)
    shards = jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), (x, weights))
    pairs = zip(
        _transformations(estimator, x, weights, axis_name="i"), _transformations(estimator, x, weights), strict=True
    )
    for tx, single in list(pairs)[:2]:
        params = h.plain_params()
        step = jax.pmap(_step(tx, estimator), axis_name="i", in_axes=(None, None, 0, 0), out_axes=0)
        result = step(params, jax.jit(tx.init)(params), *shards)
        for leaf in jax.tree.leaves(result):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        _same(jax.tree.map(lambda leaf: leaf[0], result), _expected(single, estimator, x, weights))


CHECKS = {
    check.__name__: check
    for check in (
        auto_axes,
        auto_axes_sharded_parameters,
        explicit_axes,
        explicit_axes_sampled_labels,
        shard_map,
        shard_map_schedule,
        shard_map_sampled_labels,
        pmap,
    )
}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    assert jax.device_count() == DEVICES
    for name in sys.argv[1:]:
        CHECKS[name]()
        print("passed", name)
