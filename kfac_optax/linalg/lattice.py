"""Numbers sent in a few bits, as points of a lattice of which the receiver knows about where they
are.

The sender rounds `x / s` to whole numbers and sends them modulo `K = 2^bits`; the receiver takes
those of the right remainder that are nearest to a reference of its own. So bits pay for the distance
to the reference, not for the size of `x`.

Reference: Alimisis, Davies & Alistarh, Communication-Efficient Distributed Optimization with
  Quantized Preconditioners (2021).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from kfac_optax.linalg.packing import pack, unpack

BITS = (2, 16)  # the fewest and the most in a word of 32


def spacing_of(error: Float[Array, "*batch"], size: int) -> Float[Array, "*batch"]:
    """The spacing `s = 2 error / sqrt(size)` with which `size` numbers, each rounded to the nearest
    point, are off by at most `error` together, as a Euclidean norm.

    >>> print(spacing_of(jnp.float32(1.0), 4))
    1.0
    """
    return 2 * error / math.sqrt(size)


def error_of(spacing: Float[Array, "*batch"], size: int) -> Float[Array, "*batch"]:
    """The inverse of `spacing_of`.

    >>> print(error_of(jnp.float32(1.0), 4))
    1.0
    """
    return spacing * math.sqrt(size) / 2


def reach_of(spacing: Float[Array, "*batch"], bits: int) -> Float[Array, "*batch"]:
    """How far from its reference a number may be, `(K - 1) s / 2`, to be decoded rightly.

    >>> print(reach_of(jnp.float32(2.0), 4))
    15.0
    """
    return (2**bits - 1) * spacing / 2


def points_of(
    x: Float[Array, "*shape"],
    spacing: Float[Array, "..."],
    key: jax.Array | None = None,
) -> Int[Array, "*shape"]:
    """Whole numbers next to `x / spacing`: the nearest, or with a key one of the two neighbours, at
    random and right on average (and off by up to twice as much).

    What is not finite, or so large that neighbours are the same number, is zero: see `representable`.

    >>> print(points_of(jnp.array([0.9, -2.6]), jnp.float32(0.5)))
    [ 2 -5]
    """
    scaled = jnp.where(representable(x, spacing), x / spacing, 0)
    if key is None:
        return jnp.round(scaled).astype(jnp.int32)
    # floor(x + u) is the upper neighbour as often as x is above the lower one
    noise = jax.random.uniform(key, x.shape, scaled.dtype)
    return jnp.floor(scaled + noise).astype(jnp.int32)


def representable(
    x: Float[Array, "*shape"], spacing: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """Whether each number has a point of its own.

    >>> print(representable(jnp.array([1.0, 1e9, jnp.nan]), jnp.float32(0.5)))
    [ True False False]
    """
    # neighbours have to be numbers of this precision, and their points fit in 32 bits
    largest = min(0.5 / float(jnp.finfo(x.dtype).eps), 2.0**30)
    return jnp.abs(x / spacing) < largest


def to_words(points: Int[Array, "size"], bits: int) -> UInt[Array, "words"]:
    """Points modulo `2^bits` in words of 32 bits, `32 // bits` in each.

    `word = sum_j points_j 2^(bits j)` modulo `2^32`, of whole points and not of their remainders: so
    sums of words are the words of sums, and a sum over devices can be taken of what is sent.

    >>> print(to_words(jnp.array([1, 2, -1]), 16))
    [4294901761          2]
    """
    lanes = 32 // bits
    size = words_for(len(points), bits)
    missing = lanes * size - len(points)
    padded = jnp.pad(points, (0, missing)).astype(jnp.uint32)
    # [lanes, words]: neighbours lie in different words, so that lanes are slices
    in_lanes = padded.reshape(lanes, size)
    shifts = bits * jnp.arange(lanes, dtype=jnp.uint32)
    shifted = in_lanes << shifts[:, None]
    return jnp.sum(shifted, 0, dtype=jnp.uint32)


def words_for(size: int, bits: int) -> int:
    """How many words `size` points are sent in.

    >>> print(words_for(9, 8))
    3
    """
    return -(-size // (32 // bits))


def from_words(
    words: UInt[Array, "words"], near: Float[Array, "size"], bits: int
) -> Int[Array, "size"]:
    """The points of `to_words`, each the nearest to its reference in units of the spacing; right
    where it is less than `(K - 1) / 2` away.

    >>> print(from_words(to_words(jnp.array([300, -5]), 8), jnp.array([270.0, 20.0]), 8))
    [300  -5]
    """
    lanes, count = 32 // bits, len(words)
    missing = lanes * count - len(near)
    # [lanes, words], as points are in words
    references = jnp.pad(near, (0, missing)).reshape(lanes, count)
    lowest = jnp.uint32(2**bits - 1)
    points = []
    left = words
    for lane in references:
        found = _nearest(left & lowest, lane, bits)
        points.append(found)
        # without this point, whole, the rest is divisible: what it carried over goes with it
        left = (left - found.astype(jnp.uint32)) >> bits
    return jnp.concatenate(points)[: len(near)]


def _nearest(
    remainder: UInt[Array, "words"], near: Float[Array, "words"], bits: int
) -> Int[Array, "words"]:
    """Of the numbers with a remainder modulo `K` those nearest to `near`."""
    start = jnp.floor(near).astype(jnp.int32)
    # the first of them from the start on, and the last before it
    ahead = (remainder - start.astype(jnp.uint32)) & jnp.uint32(2**bits - 1)
    above = start + ahead.astype(jnp.int32)
    below = above - 2**bits
    return jnp.where(above - near <= near - below, above, below)


def checksum(points: Int[Array, "size"]) -> UInt[Array, ""]:
    """A sum of points modulo `2^32`, each times an odd number of its own: that of a sum is the sum
    of those of its terms.

    A point off by a multiple of `K` changes it, as one is that was decoded with a reference too far
    away (the next one of its word is then off as well); several do but for one case in
    `2^(32 - bits)`.

    >>> print(checksum(jnp.array([1, 0])) == checksum(jnp.array([1 + 2**8, 0])))
    False
    """
    place = jnp.arange(len(points), dtype=jnp.uint32)
    # mixed, so that no regular pattern of errors cancels
    mixed = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x846CA68B)
    odd = mixed | jnp.uint32(1)
    weighted = points.astype(jnp.uint32) * odd
    return jnp.sum(weighted, dtype=jnp.uint32)


def triangle(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch size"]:
    """Symmetric matrices as vectors of `n (n + 1) / 2` numbers and of equal norm: those off the
    diagonal, which stand for two, times `sqrt(2)`.

    >>> print(triangle(jnp.ones((2, 2))).round(4))
    [1.     1.     1.4142]
    """
    *batch, _, n = matrix.shape
    weighted = matrix * _weights(n, matrix.dtype)
    return pack(weighted).reshape(*batch, -1)


def from_triangle(vector: Float[Array, "*batch size"], n: int) -> Float[Array, "*batch n n"]:
    """The symmetric matrices of `triangle`.

    >>> print(from_triangle(triangle(jnp.array([[1.0, 2.0], [2.0, 3.0]])), 2))
    [[1. 2.]
     [2. 3.]]
    """
    # as wide as the larger of both diagonal blocks
    columns = (n + 1) // 2
    packed = vector.reshape(*vector.shape[:-1], -1, columns)
    return unpack(packed, n) / _weights(n, vector.dtype)


def _weights(n: int, dtype: jnp.dtype) -> Float[Array, "n n"]:
    """One on the diagonal, `sqrt(2)` off it."""
    on_diagonal = jnp.eye(n, dtype=bool)
    off_diagonal = jnp.asarray(math.sqrt(2), dtype)
    return jnp.where(on_diagonal, 1, off_diagonal)
