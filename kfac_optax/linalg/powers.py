"""Products with powers of two, exact and in few equations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Scaled(NamedTuple):
    """Numbers `values * 2^exponent`, which may lie outside of the range of their dtype."""

    values: jax.Array
    exponent: jax.Array  # shape=(), dtype=int32


def exponent_near(size: jax.Array) -> jax.Array:
    """`e` with a positive finite size in `[2^(e-1), 2^e)`; where it is not normal, the least `e`.

    Read off the bits: `jnp.frexp` is twenty-seven equations, which compilers on a CPU repeat in
    every loop that scales by the result.

    >>> print(exponent_near(jnp.float32(3.0)), exponent_near(jnp.float32(0.5)))
    2 0
    """
    known = jnp.finfo(size.dtype)
    bits = jax.lax.bitcast_convert_type(size, jnp.dtype(f"int{known.bits}"))
    # sign 0, the biased exponent, mantissa; a half has maxexp - 2 there
    biased = bits >> known.nmant
    return biased.astype(jnp.int32) - (known.maxexp - 2)


def exponent_or_zero(size: jax.Array) -> jax.Array:
    """`e` with a size in `[2^(e-1), 2^e)`, zero where it is zero or not finite.

    >>> print(exponent_or_zero(jnp.array([3.0, 0.0, jnp.inf])))
    [2 0 0]
    """
    usable = jnp.isfinite(size) & (size > 0)
    # nothing to divide by: 2^0
    return exponent_near(jnp.where(usable, size, 0.5))


def times_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """`x 2^exponent`, exact but for under- and overflow of the result.

    The exponent is one that `exponent_near` finds in the dtype of `x`, or minus that, or between
    the two.

    >>> print(times_power(jnp.float32(3.0), jnp.int32(-2)))
    0.75
    """
    first, second = _powers(x.dtype, exponent)
    # bits are those of real numbers: both parts on their own
    if jnp.iscomplexobj(x):
        real = x.real * first * second
        imaginary = x.imag * first * second
        return jax.lax.complex(real, imaginary)
    return x * first * second


def _powers(dtype: Any, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two factors of `2^exponent`, neither of which leaves the range that the whole may leave.

    Made of bits: `jnp.ldexp` is fifty equations, which a deep net would have for every layer.
    """
    known = jnp.finfo(dtype)
    integer = jnp.dtype(f"int{known.bits}")
    half = exponent >> 1

    def power(n: jax.Array) -> jax.Array:
        # sign 0, the biased exponent n + maxexp - 1, mantissa 0
        bias = jnp.asarray(known.maxexp - 1, integer)
        biased = n.astype(integer) + bias
        bits = biased << known.nmant
        return jax.lax.bitcast_convert_type(bits, known.dtype)

    first = power(half)
    second = power(exponent - half)
    return first, second
