"""Rows of a layer summed over positions or features, and weights laid out beside its output."""

import math

import jax
import jax.numpy as jnp

from kfac_optax.capture import patches
from kfac_optax.capture.geometry import (
    Contraction,
    Conv,
    Geometry,
    Lookup,
    ScaleShift,
    plain_rows,
    split_last,
    to_rows,
)
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.gram import homogeneous


def reduced(
    geometry: Geometry,
    a: jax.Array,
    g: jax.Array | None,
    weights: jax.Array | None,
) -> tuple:
    """Inputs averaged and output gradients added over the positions of each example,
    `[groups, N, 1, p or q]`.

    With weights `[N, *positions]` the average is a weighted one. The third value is the weight of
    each example.
    """
    if isinstance(geometry, Conv) and weights is None:  # the mean of patches needs no unfolding
        # [groups, N, p] -> [groups, N, 1, p]
        groups = geometry.groups
        mean = patches.mean_patch(a, geometry.window, groups, reverse=geometry.flipped)
        total = None
        if g is not None:
            total = _sum_positions(split_last(g, groups))
        return mean[:, :, None], total, None
    a, g = to_rows(geometry, a, g)
    # all positions; groups and examples are in front of them
    axes = tuple(range(2, a.ndim - 1))
    total = None if g is None else _sum_positions(g)
    if weights is None:
        return a.mean(axes)[:, :, None], total, None
    per_example = weights.reshape(len(weights), -1).sum(1)
    # sum_t w_t a_t / sum_t w_t; where nothing counts, zero
    beside_positions = (-1, *(1,) * (weights.ndim - 1))
    total_weight = positive_or_one(per_example).reshape(beside_positions)
    share = weights / total_weight
    share = share[..., None]
    weighted = jnp.where(share > 0, a * share, 0)
    mean = weighted.sum(axes)
    mean_weight = per_example / math.prod(weights.shape[1:])
    return mean[:, :, None], total, mean_weight[:, None]


def _sum_positions(g: jax.Array) -> jax.Array:
    positions = tuple(range(2, g.ndim - 1))
    return g.sum(positions)[:, :, None]


def over_output(
    geometry: Geometry,
    weights: jax.Array,
    rank: int,
) -> jax.Array:
    """Weights of rows `[N, *positions]` laid out so that they broadcast with a layer's output of
    that rank.
    """
    match geometry:
        # weights have no axis for the channels: length one there
        case ScaleShift():
            return jnp.expand_dims(weights, [rank + axis for axis in geometry.axes])
        case Contraction():
            # axes of the output in the order rows, groups, outputs; then back to its own order
            front = range(rank - len(geometry.s))
            order = [*front, *(rank + axis for axis in geometry.s)]
            missing = (1,) * (rank - weights.ndim)
            weights = weights.reshape(*weights.shape, *missing)
            back = [order.index(axis) for axis in range(rank)]
            return weights.transpose(back)
        case _:
            return weights[..., None]


def channel_sums(
    geometry: Geometry,
    a: jax.Array,
    g: jax.Array,
    bias: bool,
    dtype: jnp.dtype,
) -> tuple:
    """Sums of all entries of every input row (its bias coordinate included) and gradient row,
    `[groups, N, *positions]`.
    """
    if isinstance(geometry, Conv):
        # sum_j a_j over a patch, plus the one of the bias coordinate
        groups = geometry.groups
        alpha = patches.window_sums(a.astype(dtype), geometry.window, groups)
        gamma = jnp.sum(split_last(g, groups), -1, dtype=dtype)
        return alpha + bias, gamma
    rows, gradients = plain_rows(geometry, a, g)
    assert gradients is not None
    gamma = jnp.sum(gradients, -1, dtype=dtype)
    # a one-hot row sums to one, the zeros of a token out of bounds to zero
    if isinstance(geometry, Lookup):
        size = geometry.vocabulary
        known = (rows >= -size) & (rows < size)
        return known.astype(dtype) + bias, gamma
    alpha = jnp.sum(rows, -1, dtype=dtype)
    return alpha + bias, gamma


def bias_rows(
    geometry: Geometry,
    a: jax.Array,
    g: jax.Array,
    bias: bool,
    dtype: jnp.dtype,
) -> tuple:
    """As `channel_sums`, the rows themselves: `[groups, N, *positions, p]` and
    `[groups, N, *positions, q]`.
    """
    rows, gradients = to_rows(geometry, a, g)
    rows = rows.astype(dtype)
    return homogeneous(rows) if bias else rows, gradients.astype(dtype)
