"""What TNT does with every axis: averages over sampled gradients, and their damped inverses."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import select
from kfac_optax._types import Numeric, PyTree
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import psd_inverse
from kfac_optax.linalg.in_order import after
from kfac_optax.methods.gradient.axes import FULL, Group
from kfac_optax.methods.gradient.axis_products import along, statistic
from kfac_optax.methods.gradient.axiswise import Step
from kfac_optax.methods.gradient.phases import (
    ByAxis,
    Phases,
    Weights,
    identities,
    zeros_by_axis,
)
from kfac_optax.methods.gradient.sampled import sampled_tensors


def tensor_normal(examples: Numeric | None) -> Phases:
    """Averages over sampled gradients and their inverses, normalised by the trace."""

    # the identity until something has been measured
    def start(group: Group, dtype: Any) -> tuple[ByAxis, ByAxis]:
        return zeros_by_axis(group, dtype), identities(group, dtype)

    def take_in(
        group: Group,
        tensors: jax.Array,
        factors: ByAxis,
        weights: Weights,
    ) -> ByAxis:
        # examples are one more axis of every tensor, [copies, N, *block], summed over with the rest
        joined = jnp.moveaxis(tensors, 0, 1)
        held, new = weights
        out = {}
        for i, kind in enumerate(group.kinds):
            # the mean over examples of mat_i(g) mat_i(g)^T, not the product of the mean
            mean = statistic(joined, i + 1, kind) / len(tensors)
            out[str(i)] = held * factors[str(i)] + new * mean
        return out

    def apply(
        group: Group,
        step: Step,
        factors: ByAxis,
        inverses: ByAxis,
        weights: Weights,
    ):
        # G x_1 (F_1 + l_1 I)^{-1} ... x_k (F_k + l_k I)^{-1}
        u = step.tensors[group.name]
        scale, known = _scale(group, factors)
        for i, kind in enumerate(group.kinds):
            if kind == FULL:
                u = along(u, i, inverses[str(i)])
            else:  # never stale
                shift = _share(group, i, step.value("damping"))
                # a diagonal axis is divided by
                divisor = scale[:, None] * factors[str(i)] + shift
                inverse = jnp.where(known[:, None], 1 / divisor, 1)
                u = along(u, i, inverse)
        return u

    def observe(step: Step) -> dict[str, jax.Array]:
        return sampled_tensors(step, examples)

    return Phases(start, take_in, apply, _refresh, observe)


def _refresh(
    group: Group,
    step: Step,
    factors: ByAxis,
    inverses: ByAxis,
    previous: PyTree,
):
    # A_i = F_i / s^((k-1)/k), so that the product over axes needs no scale of its own
    made = {}
    scale, known = _scale(group, factors)
    for axis, old in inverses.items():
        # one batched factorisation after another
        scaled = scale[:, None, None] * factors[axis]
        ready = after(scaled, previous)
        # l_i = damping^(1/k) n / n_i
        shift = _share(group, int(axis), step.value("damping"))
        previous = jax.vmap(psd_inverse, (0, None))(ready, shift)
        made[axis] = select(known, previous, old)
    return made, previous


def _scale(group: Group, factors: ByAxis) -> tuple[jax.Array, jax.Array]:
    """`s^(-(k-1)/k)` of every tensor, `[copies]`, and whether anything of it has been measured."""
    # s = tr F_i is the same for every axis: the sum of all squares
    first = factors["0"]
    matrices = first.ndim == 3
    s = jnp.trace(first, axis1=1, axis2=2) if matrices else jnp.sum(first, 1)
    k = len(group.block)
    scale = positive_or_one(s) ** (-(k - 1) / k)
    return scale, s > 0


def _share(group: Group, axis: int, damping: jax.Array) -> jax.Array:
    """The part of the damping that one axis gets, `damping^(1/k) n / n_i`."""
    # n = (n_1 ... n_k)^(1/k), so that the product over axes is the damping
    k = len(group.block)
    mean = 1.0
    for n in group.block:
        mean *= n ** (1 / k)
    share = mean / group.block[axis]
    return damping ** (1 / k) * share
