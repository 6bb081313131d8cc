"""Methods of gradients alone where every device has its own gradient, run by
`test_many_devices.py`.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from kfac_optax.linalg.interpolative import interpolate
from kfac_optax.linalg.newton import newton_inverse
from kfac_optax.linalg.roots import inverse_root
from kfac_optax.linalg.row_inverse import inverse_of_rows
from tests import helpers as h

DEVICES, STEPS = 4, 3
# those whose steps branch on what is due
METHODS = {
    "shampoo": functools.partial(
        ko.scale_by_shampoo, statistics="kl", decay=0.9, ridge=1e-2, inverse_every=2
    ),
    "soap": functools.partial(ko.scale_by_soap, inverse_every=2),
    "psgd_kron": ko.psgd_kron,
    "tonga": ko.tonga,
}


def train(tx, x):
    """Updates and state after the gradients of one device, `[steps, 3, 2]`."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state, gradient)
        return state, updates

    # a state that varies from the start, as the parameters do
    state, updates = jax.lax.scan(step, tx.init(x[0]), x)
    return updates, state


def own_gradients():
    """Each device has updates and a state as if it were alone."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (DEVICES, STEPS, 3, 2))
    for make in METHODS.values():
        alone = functools.partial(train, make())

        def one(x, alone=alone):
            # an axis of devices in front, also of counts
            return jax.tree.map(lambda leaf: leaf[None], alone(x[0]))

        divided = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
        single = jax.jit(alone)
        expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(single, x))
        h.assert_close(jax.device_get(divided(x)), jax.device_get(expected), rtol=1e-4, atol=1e-5)


def own_matrices():
    """Loops of products run on matrices that differ between devices."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (DEVICES, 3, 4))
    x = x @ x.mT

    def all_of(m):
        inverse = newton_inverse(m, jnp.float32(0.1), jnp.eye(3))
        root = inverse_root(m, 4, method="newton")
        return inverse, root, interpolate(m, 2), inverse_of_rows(m, 1.0)

    one = lambda m: jax.tree.map(lambda leaf: leaf[None], all_of(m[0]))
    divided = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    single = jax.jit(all_of)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(single, x))
    h.assert_close(jax.device_get(divided(x)), jax.device_get(expected), rtol=1e-4, atol=1e-5)


def forgotten_mean():
    """A state that is said to be the same everywhere, but is not, is refused by JAX."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x, tx = jnp.ones((DEVICES, 3, 2)), METHODS["shampoo"]()
    update = lambda x, state: tx.update(x[0], state)
    divided = jax.shard_map(update, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    with pytest.raises(ValueError, match="out_specs which require replication"):
        jax.eval_shape(divided, x, tx.init(x[0]))


def split_parameters():
    """Of a method of all parameters together, divided over an explicit axis: the same numbers,
    divided as they are.
    """
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Explicit,))
    keys, tx = jax.random.split(jax.random.key(0), 9), ko.tonga(rank=1, block=2)
    whole = {f"layer_{i}": jax.random.normal(key, (DEVICES, 3)) for i, key in enumerate(keys)}
    expected, _ = tx.update(whole, tx.init(whole))
    with jax.set_mesh(mesh):
        split = jax.tree.map(lambda x: jax.reshard(x, P("d", None)), whole)
        updates, _ = tx.update(split, tx.init(split))
    assert {x.sharding.spec for x in jax.tree.leaves(updates)} == {P("d", None)}
    h.assert_close(jax.device_get(updates), jax.device_get(expected), rtol=1e-4)


OF_OWN = (own_gradients, own_matrices, forgotten_mean, split_parameters)
CHECKS = {check.__name__: check for check in OF_OWN}
