"""A root `K` with `K K^T` near the inverse of a factor, and how a batch moves it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Numeric
from kfac_optax.linalg.groups import group_gram, group_identity, group_product
from kfac_optax.linalg.root_structures import Structure


class Root(NamedTuple):
    """`K`, with `K K^T ~ A^{-1}`, and the momentum of its logarithm, both in a structure."""

    root: Array
    momentum: Array


class Scales(NamedTuple):
    """What one side says to the other: `tr(H) / d` and `tr(K^T K) / d`."""

    curvature: Array | float
    length: Array | float


def first_root(
    form: Structure,
    total: Float[Array, ""],
    dimension: int,
) -> Root:
    """That of a multiple of the identity, at rest."""
    # [m, s, s], the blocks of I
    identity = group_identity(dimension, form.width(dimension), total.dtype)
    root = form.compress(identity / jnp.sqrt(total))
    return Root(root, jnp.zeros_like(root))


def root_moments(
    form: Structure,
    held: Root,
    x: Float[Array, "*rows d"],
    weights: Array | None,
    precision: jax.lax.PrecisionLike,
) -> Array:
    """`P[H]` with `H = sum_rows w (K^T x) (K^T x)^T`, of blocks alone where the structure has some."""
    # K^T x for every row
    rotated = group_product(x, form.expand(held.root), precision=precision)
    size = form.width(x.shape[-1])
    return form.tangent(group_gram(rotated, size, weights, precision=precision))


def root_scales(
    form: Structure,
    held: Root,
    moments: Array,
    dimension: int,
) -> Scales:
    """Of one side, from its moments: their diagonal is that of `H`."""
    # P keeps the trace of H
    trace = jnp.einsum("mii->", form.expand(moments))
    square = jnp.sum(form.expand(held.root) ** 2)
    return Scales(trace / dimension, square / dimension)


def root_force(
    form: Structure,
    held: Root,
    moments: Array,
    other: Scales,
    damping: Array,
    dimension: int,
    precision: jax.lax.PrecisionLike,
) -> Array:
    """`P[c H + damping l K^T K - I]` with the scales `c`, `l` of the other side; zero where `K K^T`
    is the damped inverse.
    """
    k = form.expand(held.root)
    # K^T K
    square = jnp.matmul(k.mT, k, precision=precision)
    identity = group_identity(dimension, form.width(dimension), k.dtype)
    rest = damping * other.length * square - identity
    return other.curvature * moments + form.tangent(rest)


def moved_root(
    form: Structure,
    held: Root,
    force: Array,
    rate: Numeric,
    momentum: Numeric,
    precision: jax.lax.PrecisionLike,
) -> Root:
    """`m <- momentum m + force / 2` and `K <- K (I - rate m)`, by less where `rate m` may be longer
    than 1/2.
    """
    velocity = momentum * held.momentum + force / 2
    k, m = form.expand(held.root), form.expand(velocity)
    # |beta m| <= 1/2, so that I - beta m stays invertible
    beta = rate / jnp.maximum(1, 2 * rate * _spectral_bound(m))
    product = jnp.matmul(k, m, precision=precision)
    moved = form.compress(k - beta * product)
    dtype = held.root.dtype  # injected numbers may be wider
    return Root(moved.astype(dtype), velocity.astype(dtype))


def times_square(
    form: Structure,
    held: Root,
    x: Float[Array, "*rows d"],
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*rows d"]:
    """`x K K^T`."""
    k = form.expand(held.root)
    product = group_product(x, k, precision=precision)
    return group_product(product, k.mT, precision=precision)


def _spectral_bound(blocks: Float[Array, "m s s"]) -> Array:
    """No less than the spectral norm: the geometric mean of the largest sums of rows and columns."""
    sizes = jnp.abs(blocks)
    rows = jnp.max(jnp.sum(sizes, -1))
    columns = jnp.max(jnp.sum(sizes, -2))
    return jnp.sqrt(rows * columns)
