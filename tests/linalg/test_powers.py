"""Products with powers of two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax.linalg.powers import exponent_near, times_power


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_times_power_is_exact_in_the_whole_range(dtype, x64):
    """Every exponent that normal numbers of a dtype have, up and down, against NumPy's `ldexp`."""
    known = jnp.finfo(dtype)
    exponents = np.arange(known.minexp, known.maxexp - 1)
    x = jnp.full(exponents.shape, 1.75, dtype)
    powers = jnp.asarray(exponents, jnp.int32)
    up = times_power(x, powers)
    np.testing.assert_array_equal(np.asarray(up, np.float64), np.ldexp(1.75, exponents))
    np.testing.assert_array_equal(times_power(up, -powers), x)
    with_imaginary = times_power(jax.lax.complex(*(x.astype(jnp.float64),) * 2), powers)
    np.testing.assert_array_equal(with_imaginary.imag, np.ldexp(1.75, exponents))


def test_times_power_beyond_the_range_of_one_factor():
    """The largest entry brought to one and back, where `2^exponent` itself is no finite number."""
    x = jnp.float32([3e38])
    power = jnp.int32(128)
    np.testing.assert_array_equal(times_power(times_power(x[0], -power), power), x[0])
    assert float(times_power(jnp.float32(1.0), power)) == np.inf
    assert float(times_power(jnp.float32(0.5), power)) == 2.0**127


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_exponents_are_those_of_frexp(x64, dtype):
    known = jnp.finfo(dtype)
    sizes = np.array([1, 0.5, 0.75, 3, known.max, known.tiny, 1 - known.epsneg], dtype)
    np.testing.assert_array_equal(exponent_near(jnp.asarray(sizes)), np.frexp(sizes)[1])
    # the power is never too small
    below = jnp.asarray(known.tiny / 4, dtype)
    assert exponent_near(below) == np.frexp(known.tiny)[1] - 1
