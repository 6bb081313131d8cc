"""Statistics on their way between devices, which `vmap` with a named axis stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax._types import Travel
from kfac_optax.blocks.kronecker import Factors
from kfac_optax.estimators.reductions import mean_over_devices
from kfac_optax.linalg.packing import pack, unpack
from tests import helpers as h

DEVICES, COPIES, P, Q = 4, 2, 5, 6


def statistics():
    """Two symmetric factors, and a square matrix that is none, on every device."""
    keys = jax.random.split(jax.random.key(0), 3)
    a = jax.random.normal(keys[0], (DEVICES, COPIES, 7, P))
    g = jax.random.normal(keys[1], (DEVICES, COPIES, 7, Q))
    factors = Factors(*(jnp.einsum("dcni,dcnj->dcij", x, x) for x in (a, g)))
    return factors, jax.random.normal(keys[2], (DEVICES, COPIES, P, P))


def mean(travel):
    return jax.vmap(lambda tree: mean_over_devices(tree, "devices", travel), axis_name="devices")


def sums(travel):
    """Types of what is summed over devices."""
    shapes = jax.tree.map(lambda x: x[0], statistics())
    program = jax.make_jaxpr(
        lambda tree: mean_over_devices(tree, "devices", travel), axis_env=[("devices", DEVICES)]
    )(shapes)
    found = [e for e in h.equations(program.jaxpr) if e.primitive.name.startswith("psum")]
    return [x.aval for e in found for x in e.invars]


@pytest.mark.parametrize("n", range(1, 8))
def test_packing_keeps_every_entry_once(n):
    x = np.arange(2 * n * n, dtype=np.float32).reshape(2, n, n)
    x = x + x.transpose(0, 2, 1)
    packed = pack(jnp.asarray(x))
    assert packed.size == 2 * (n * (n + 1) // 2)  # no number twice
    assert packed[0].size == n * (n + 1) // 2
    np.testing.assert_array_equal(unpack(packed, n), x)
    upper = x[0][np.triu_indices(n)]
    np.testing.assert_array_equal(np.sort(packed[0].ravel()), np.sort(upper))


def test_packed_means_are_the_means_and_only_factors_are_packed():
    expected = jax.tree.map(lambda x: jnp.broadcast_to(x.mean(0), x.shape), statistics())
    h.assert_close(mean(Travel(packed=True))(statistics()), expected, rtol=1e-5)
    sizes = sorted(x.size for x in sums(Travel(packed=True)))
    assert sizes == sorted(COPIES * n for n in (P * (P + 1) // 2, Q * (Q + 1) // 2, P * P))
    assert sorted(x.size for x in sums(Travel())) == sorted(COPIES * n * n for n in (P, P, Q))


def test_sums_in_half_precision_are_off_by_its_rounding():
    travel = Travel(packed=True, dtype=jnp.bfloat16)
    assert {x.dtype for x in sums(travel)} == {jnp.dtype(jnp.bfloat16)}
    got, exact = mean(travel)(statistics()), mean(Travel())(statistics())
    for x, y, before in zip(*map(jax.tree.leaves, (got, exact, statistics())), strict=True):
        assert x.dtype == jnp.float32
        # each share and each partial sum is rounded to eight bits
        bound = 2 * DEVICES * 2.0**-8 * jnp.abs(before).mean(0)
        assert jnp.all(jnp.abs(x - y) <= bound)
        assert jnp.any(x != y)
