"""Statistics on their way between devices, which `vmap` with a named axis stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax._types import Near, Travel
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.estimators.near_means import near_means
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


def near_mean(factors, near, bits):
    """What every device makes of the factors of all."""
    mean = lambda x: near_means([x], [near], "devices", bits)[0]
    return jax.jit(jax.vmap(mean, axis_name="devices"))(factors)


def factors_near(away, error):
    """Factors of every device, and what all of them have, `away` from the mean."""
    factors, _ = statistics()
    errors = jnp.full(COPIES, error), jnp.full(COPIES, error / 2)
    known = Factors(*(x.mean(0) + away * jnp.eye(x.shape[-1]) for x in factors))
    return factors, Near(known, errors, (jnp.full(COPIES, 1e6),) * 2)


def errors_of(found, factors):
    """In Frobenius norm, of every copy; on all devices the same, to the last digit."""
    for x in found:
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        np.testing.assert_array_equal(x, np.swapaxes(x, -1, -2))
    means = [np.asarray(x, np.float64).mean(0) for x in factors]
    return [np.linalg.norm(x[0] - y, axis=(1, 2)) for x, y in zip(found, means, strict=True)]


def test_a_mean_in_a_few_bits_is_off_by_its_error_at_most():
    """Devices may be far from what all know: it is their mean that has to be near."""
    factors, near = factors_near(0.2, 0.1)
    inputs, outputs = errors_of(near_mean(factors, near, 10), factors)
    # rounding, not less: it is not sent as it is
    assert (inputs > 1e-3).all()
    assert (outputs > 1e-3).all()
    assert (inputs <= 0.1).all()
    assert (outputs <= 0.05).all()
    step = 2 * 0.1 / np.sqrt(P * (P + 1) / 2)
    assert np.abs(factors.inputs - near.factors[0]).max() > 2**10 / 2 / DEVICES * step


def test_a_mean_too_far_away_for_its_bits_is_sent_as_it_is():
    for away, bits in ((50.0, 10), (0.2, 4)):
        factors, near = factors_near(away, 0.1)
        for x in errors_of(near_mean(factors, near, bits), factors):
            np.testing.assert_allclose(x, 0, atol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_on_one_device_is_not_on_any(bad):
    factors, near = factors_near(0.2, 0.1)
    broken = factors._replace(inputs=factors.inputs.at[1, 0, 0, 0].set(bad))
    found = near_mean(broken, near, 10)
    assert not np.isfinite(found.inputs[:, 0, 0, 0]).any()
    assert np.isfinite(found.outputs).all()


def test_means_in_a_few_bits_send_no_more_than_these():
    """A word for as many numbers as fit, and two beside them; all else where points do not do."""
    shapes = jax.tree.map(lambda x: x[0], statistics()[0])
    near = factors_near(0.2, 0.1)[1]
    program = jax.make_jaxpr(
        lambda x: near_means([x], [near], "devices", 8), axis_env=[("devices", DEVICES)]
    )(shapes)
    at_top = [e for e in program.jaxpr.eqns if e.primitive.name.startswith("psum")]
    numbers = COPIES * (P * (P + 1) // 2 + Q * (Q + 1) // 2)
    assert [x.aval.size for e in at_top for x in e.invars] == [-(-numbers // 4) + 2]


def test_matrices_that_outgrow_their_errors_are_sent_as_they_are():
    """Within reach of the bits, and larger than the errors allow for."""
    factors, near = factors_near(0.2, 0.1)
    for allowed in (1e-3, -1.0):
        far = near._replace(largest=(near.largest[0], jnp.full(COPIES, allowed)))
        for x in errors_of(near_mean(factors, far, 10), factors):
            np.testing.assert_allclose(x, 0, atol=1e-5)


def test_points_whose_sum_is_a_multiple_of_what_a_word_holds_are_not_taken(x64):
    """Four times `2^30 - 1` is `-4` in a word, and in a checksum."""
    start, one = jnp.zeros((1, 1, 1)), jnp.ones(1)
    near = Near((start, start), (one / 2, one / 2), (2.0**40 * one, 2.0**40 * one))
    x = jnp.full((4, 1, 1, 1), 2.0**30 - 1)
    found = near_mean(Factors(x, x), near, 16)
    np.testing.assert_array_equal(found.inputs, x)
    np.testing.assert_array_equal(found.outputs, x)


def test_one_device_of_two_that_cannot_take_part_is_enough():
    """The other one has nothing to count."""
    start, one = jnp.eye(1)[None], jnp.ones(1)
    near = Near((start, start), (one / 9, one / 9), (one, one))
    x = jnp.array([jnp.nan, 0.0]).reshape(2, 1, 1, 1)
    found = near_mean(Factors(x, jnp.zeros_like(x)), near, 8)
    assert jnp.isnan(found.inputs).all()
