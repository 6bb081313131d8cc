"""Arguments that wait for other arrays, and are the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import Mesh, PartitionSpec

from kfac_optax.estimators.in_turn import in_turn, is_cut

DIRECTION = {"w": jnp.full((2, 3), jnp.nan), "b": jnp.ones(3, jnp.bfloat16)}
ONE_DEVICE = Mesh(np.array(jax.devices()[:1]), ("data",))
SPLIT, SAME = PartitionSpec("data"), PartitionSpec()


def waits(function, x, previous):
    """Whether what comes out is computed from all of `previous`."""
    closed = jax.make_jaxpr(function)(x, previous)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return all(used[len(jax.tree.leaves(x)) :])


def turned(x, previous):
    return in_turn((x,), previous)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_numbers_stay_whatever_they_wait_for(dtype):
    x = jnp.asarray([1, 0, 1]).astype(dtype)
    got = jax.jit(turned)(x, DIRECTION)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, x)
    assert waits(turned, x, DIRECTION)
    # mapped, with a direction for each and one for all
    pairs = jax.tree.map(lambda v: jnp.stack([v, v]), (x, DIRECTION))
    np.testing.assert_array_equal(jax.vmap(turned)(*pairs), pairs[0])
    np.testing.assert_array_equal(jax.vmap(turned, (0, None))(pairs[0], DIRECTION), pairs[0])


def test_what_has_no_axes_or_is_no_array_of_jax_stays_itself():
    args = jax.random.key(0), jnp.ones(()), np.ones(2), jax.ShapeDtypeStruct((2,), jnp.float32), 3

    def same(direction):
        assert all(new is old for new, old in zip(in_turn(args, direction), args, strict=True))
        return direction

    jax.jit(same)(DIRECTION)
    # out of a compiled function, and behind nothing that has a direction
    x = (jnp.ones(2),)
    assert in_turn(x, DIRECTION)[0] is x[0]
    assert not is_cut(x, in_turn(x, {"steps": jnp.ones(2, jnp.int32), "none": jnp.ones(0)}))


def test_on_devices_no_value_becomes_one_of_a_device_alone():
    x, w = jnp.arange(4.0), jnp.ones(2)

    def mapped(of_x, of_w):
        return jax.shard_map(turned, mesh=ONE_DEVICE, in_specs=(of_x, of_w), out_specs=of_x)

    assert waits(mapped(SPLIT, SAME), x, w)
    assert waits(mapped(SPLIT, SPLIT), x, w)
    # `out_specs` of what is the same everywhere would be refused
    assert not waits(mapped(SAME, SPLIT), x, w)
    np.testing.assert_array_equal(jax.jit(mapped(SPLIT, SPLIT))(x, w), x)


def test_in_steps_of_a_scan():
    def body(direction, x):
        x = turned(x, direction)
        return direction + x.sum(), x

    xs = jnp.arange(6.0).reshape(3, 2)
    total, same = jax.jit(lambda xs: jax.lax.scan(body, jnp.zeros(()), xs))(xs)
    np.testing.assert_array_equal(same, xs)
    np.testing.assert_array_equal(total, xs.sum())
