"""Equal layers so wide that JAX spreads their factorisations over threads, which the devices of a
process share; run by `test_many_devices.py` with threads.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from kfac_optax.linalg import lapack
from kfac_optax.testing.factorizations import stacked
from tests import helpers as h

DEVICES, EXAMPLES, WIDTH, LAYERS = 8, 16, 300, 3


def losses(params, x):
    for kernel in params.values():
        x = jnp.tanh(h.dense(x, kernel))
    return jnp.square(x).sum(1)


def _problem():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    draw = jax.nn.initializers.lecun_normal()
    params = {f"layer{i}": draw(key, (WIDTH, WIDTH)) for i, key in enumerate(keys)}
    return params, jax.random.normal(jax.random.key(1), (EXAMPLES, WIDTH))


def _check(inverse):
    """One refresh on automatic axes and inside `shard_map` returns, with the updates of one
    device.
    """
    params, x = _problem()
    estimator = ko.empirical_fisher(losses)
    layers = estimator.layers(params, x[:DEVICES])

    def step(axis_name=None):
        # damping of the size of the factors: rounding stays rounding
        words = {"damping": 1.0, "inverse": inverse, "bound": "damped", "axis_name": axis_name}
        tx = ko.kfac(layers, learning_rate=0.1, **words)

        def update(params, x):  # any gradient will do, so the parameters serve
            curvature = estimator.at(params, x)
            return tx.update(params, tx.init(params), params, curvature=curvature, refresh=True)[0]

        return update

    expected = jax.device_get(jax.jit(step())(params, x))
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    for function in (step(), jax.shard_map(step("data"), mesh=mesh, **specs)):
        compiled = jax.jit(function).lower(whole, split).compile()
        calls, count = stacked(compiled.as_text())
        assert calls == []
        assert count > 0
        h.assert_close(jax.device_get(compiled(whole, split)), expected)


def wide_eigh():
    """Eigenvectors of three equal layers."""
    _check("eigh")


def wide_cholesky():
    """Cholesky factors of three equal layers."""
    _check("cholesky")


def divided_stacks():
    """Of a stack that is divided over explicit or manual axes every device factorises its own."""
    root = jax.random.normal(jax.random.key(0), (DEVICES, 2, 4, 4))
    stack = root @ root.mT + jnp.eye(4)
    expected = jax.device_get(jnp.linalg.cholesky(stack))
    calls = (lapack.cholesky, jax.vmap(lapack.cholesky), jax.vmap(jax.vmap(lapack.cholesky)))
    for shape, axes in (((DEVICES,), "data"), ((2, DEVICES // 2), ("data", "model"))):
        names = ("data", "model")[: len(shape)]
        manual = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
        explicit = jax.make_mesh(shape, names)
        for call in calls:
            mapped = jax.shard_map(call, mesh=manual, in_specs=P(axes), out_specs=P(axes))
            h.assert_close(jax.device_get(jax.jit(mapped)(stack)), expected)
            with jax.set_mesh(explicit):
                factors = jax.jit(call)(jax.device_put(stack, P(axes)))
                assert jax.typeof(factors).sharding.spec[0] == axes
                h.assert_close(jax.device_get(factors), expected)


CHECKS = {check.__name__: check for check in (wide_eigh, wide_cholesky, divided_stacks)}
