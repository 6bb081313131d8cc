"""Means of Kronecker factors over devices, sent in a few bits: as points of a lattice near factors
that all devices have.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._types import Near, PyTree, Travel
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.estimators.plan import Plan
from kfac_optax.estimators.reductions import devices_of, mean_over_devices
from kfac_optax.linalg import lattice

_chain = itertools.chain.from_iterable


def means_of_plan(
    plan: Plan, blocks: Sequence[PyTree], across: PyTree
) -> tuple[list[PyTree], PyTree]:
    """Means over devices of the statistics of all layers and of the coupling: near what all devices
    have where the plan says so, as ever elsewhere.
    """
    bits, axes = plan.travel.bits, plan.averaged_over
    rest, factors = list(blocks), {}
    for i, near in enumerate(plan.near):
        if near is None or bits is None or not axes:
            continue
        # a block that absorbs means has them beside its factors
        paired = plan.blocks[i].absorb is not None and plan.blocks[i].absorbs == "means"
        factors[i] = blocks[i][0] if paired else blocks[i]
        rest[i] = (None, blocks[i][1]) if paired else None
    means, across = mean_over_devices((rest, across), axes, plan.travel)
    if bits is None or not factors:
        return means, across
    known = [near for near in plan.near if near is not None]
    found = near_means([*factors.values()], known, axes, bits)
    for i, mean in zip(factors, found, strict=True):
        means[i] = mean if rest[i] is None else (mean, means[i][1])
    return means, across


def near_means(
    factors: Sequence[Factors], near: Sequence[Near], axis_name: Any, bits: int
) -> list[Factors]:
    """Means over devices of Kronecker factors, each off by at most its error in Frobenius norm.

    With `R` what all devices have, device `d` sends `k_d = round((X_d - R) / s)` modulo `2^bits`,
    off the diagonal times `sqrt(2)` and once. The sum of these points over the devices gives
    `R + s sum_d k_d / W`: whole numbers, the same everywhere in whatever order they are added up.
    With `s = 2 error / sqrt(size)` rounding costs at most the error. The sum is known where it is
    within reach, `|sum_d k_d| < 2^bits / 2`; a checksum beside it tells whether it is. Where it is
    not, or something is not finite, or matrices have outgrown their errors, all are sent as they are.

    Args:
      factors: of this device, `[copies, n, n]` each matrix.
      near: what all devices have of them, and the errors.
      axis_name: mapped axis, or several.
      bits: of a number that is sent.
    """
    # of all layers one after another: inputs, outputs
    matrices = [*_chain(factors)]
    known = [*_chain(of_layer.factors for of_layer in near)]
    errors = [*_chain(of_layer.errors for of_layer in near)]
    spacings = [_spacing(x, error) for x, error in zip(known, errors, strict=True)]
    offsets = [lattice.triangle(x - r) for x, r in zip(matrices, known, strict=True)]
    pairs = list(zip(offsets, spacings, strict=True))
    points = jnp.concatenate([lattice.points_of(x, s).ravel() for x, s in pairs])
    devices = devices_of(axis_name)
    usable = jnp.stack([lattice.representable(x, s).all() for x, s in pairs]).all()
    # sums of whole points have to fit in 32 bits: modulo 2^32 a checksum knows no others
    usable &= jnp.max(jnp.abs(points)) < 2**31 // devices
    largest = [*_chain(of_layer.largest for of_layer in near)]
    size = _size(matrices, largest)
    # in one sum: all points, their checksum, and the sizes in parts of what is allowed for the mean
    # whole numbers below 2^24, which are exact, and a sum that fits
    unit = max(1, min(2**16, 2**31 // devices**2))
    most = unit * devices
    parts = jnp.where(
        usable & (size <= devices), jnp.ceil(unit * size.astype(jnp.float32)), most + 1
    )
    beside = jnp.stack([lattice.checksum(points), parts.astype(jnp.uint32)])
    words = jnp.concatenate([lattice.to_words(points, bits), beside])
    words = jax.lax.psum(words, axis_name)
    # differences: the nearest to zero
    total = lattice.from_words(words[:-2], jnp.zeros(points.shape, jnp.float32), bits)
    right = (lattice.checksum(total) == words[-2]) & (words[-1] <= most)

    def decoded(_: Sequence[jax.Array]) -> list[jax.Array]:
        return _decoded(total / devices, known, spacings)

    def exact(matrices: Sequence[jax.Array]) -> list[jax.Array]:
        pairs = [Factors(*matrices[i : i + 2]) for i in range(0, len(matrices), 2)]
        means = mean_over_devices(pairs, axis_name, Travel(packed=True))
        return [*_chain(means)]

    # the same branch on all devices: it depends on sums alone
    means = jax.lax.cond(right, decoded, exact, matrices)
    return [Factors(*means[i : i + 2]) for i in range(0, len(means), 2)]


def _size(matrices: Sequence[jax.Array], largest: Sequence[jax.Array]) -> jax.Array:
    """The largest norm of the matrices of a device, relative to those allowed; Inf or NaN where none
    is. The mean of sizes is at least the size of the mean.
    """
    sizes = []
    for x, limit in zip(matrices, largest, strict=True):
        norms = jnp.linalg.norm(x, axis=(1, 2)) / limit
        sizes.append(jnp.max(jnp.where(limit > 0, norms, jnp.inf)))
    return jnp.max(jnp.stack(sizes))


def _spacing(matrix: jax.Array, error: jax.Array) -> jax.Array:
    """Of the lattice of matrices `[copies, n, n]`, `[copies, 1]`."""
    n = matrix.shape[-1]
    return lattice.spacing_of(error, n * (n + 1) // 2)[:, None]


def _decoded(
    points: jax.Array, known: Sequence[jax.Array], spacings: Sequence[jax.Array]
) -> list[jax.Array]:
    """`R + s k`, from the points of all matrices one after another."""
    means, start = [], 0
    for near, spacing in zip(known, spacings, strict=True):
        copies, n, _ = near.shape
        size = copies * n * (n + 1) // 2
        mine = points[start : start + size].reshape(copies, -1).astype(near.dtype)
        means.append(near + lattice.from_triangle(spacing * mine, n))
        start += size
    return means
