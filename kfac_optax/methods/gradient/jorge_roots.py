"""What Jorge does with every axis: roots that follow the statistics, and products with them."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._types import PyTree
from kfac_optax.linalg.series_root import diagonal_step, root_step
from kfac_optax.methods.gradient.axes import FULL, Group
from kfac_optax.methods.gradient.axis_products import along, statistic
from kfac_optax.methods.gradient.axiswise import Step
from kfac_optax.methods.gradient.phases import ByAxis, Phases, Weights


def followed_roots(eps: float) -> Phases:
    """Roots that follow the statistics of the steps where they are due; nothing else is kept."""

    def start(group: Group, dtype: Any) -> tuple[ByAxis, ByAxis]:
        roots = {}  # eps^(-1/p) I, or that diagonal
        # injected, it is known only now; where it makes no sense the default stands in
        legal = jnp.isfinite(eps) & (jnp.asarray(eps) > 0)
        usable = jnp.where(legal, eps, 1e-6).astype(dtype)
        first = usable ** (-1 / (2 * len(group.block)))
        for i, (n, kind) in enumerate(zip(group.block, group.kinds, strict=True)):
            # [copies, n, n] or [copies, n]
            one = jnp.eye(n, dtype=dtype) if kind == FULL else jnp.ones(n, dtype)
            repeats = (group.copies,) + one.ndim * (1,)
            roots[str(i)] = jnp.tile(first * one, repeats)
        return {}, roots

    def take_in(
        group: Group,
        tensors: jax.Array,
        factors: ByAxis,
        weights: Weights,
    ) -> ByAxis:
        return factors

    def refresh(
        group: Group,
        step: Step,
        factors: ByAxis,
        roots: ByAxis,
        previous: PyTree,
    ):
        # the gradient of this step is all that the roots see; those between have no part
        # R of H^(-1/p), p = 2 k for k axes
        p = 2 * len(group.block)
        decay = step.value("decay")
        made = {}
        for i, kind in enumerate(group.kinds):
            new = statistic(step.tensors[group.name], i, kind)
            follow = root_step if kind == FULL else diagonal_step
            each = jax.vmap(follow, (0, 0, None, None))
            made[str(i)] = each(roots[str(i)], new, p, decay)
        return made, previous

    def apply(
        group: Group,
        step: Step,
        factors: ByAxis,
        roots: ByAxis,
        weights: Weights,
    ):
        # G x_1 R_1 ... x_k R_k
        u = step.tensors[group.name]
        for i in range(len(group.block)):
            u = along(u, i, roots[str(i)])
        return u

    return Phases(start, take_in, apply, refresh)
