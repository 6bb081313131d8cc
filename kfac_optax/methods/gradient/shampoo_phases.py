"""What Shampoo does with every axis: statistics, their roots, and the gradient between these."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import select
from kfac_optax._types import PyTree
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.roots import inverse_root
from kfac_optax.methods.gradient.axes import Group
from kfac_optax.methods.gradient.axis_products import along
from kfac_optax.methods.gradient.axiswise import Step
from kfac_optax.methods.gradient.length import no_longer_than_fresh
from kfac_optax.methods.gradient.phases import (
    ByAxis,
    Phases,
    Weights,
    averaged_in,
    diagonal_root,
    identities,
    zeros_by_axis,
)


def check_root(where: str, root: Any) -> None:
    """Checks the `p` of roots `H^(-1/p)`.

    Raises:
      ValueError: it is no positive Python integer and not `None`.
    """
    if root is not None and (not isinstance(root, int) or root < 1):
        raise ValueError(f"{where}: root={root!r}; expected a positive Python int or None.")


def shampoo_phases(root: int | None, method: str) -> Phases:
    """Sums or averages of every axis, their roots, and the gradient between these."""

    def start(group: Group, dtype: Any) -> tuple[ByAxis, ByAxis]:
        return zeros_by_axis(group, dtype), identities(group, dtype)

    def refresh(
        group: Group,
        step: Step,
        factors: ByAxis,
        inverses: ByAxis,
        previous: PyTree,
    ):
        p, ridge = power_of(group, root), step.now["ridge"]

        def root_of(h: jax.Array) -> jax.Array:
            return inverse_root(h, p, ridge=ridge, method=method)

        made = {}
        # diagonal axes hold their statistic alone
        for axis, old in inverses.items():
            # one batched factorisation after another
            ready = after(factors[axis], previous)
            previous = jax.vmap(root_of)(ready)
            # nothing measured: the identity stays
            known = jnp.any(factors[axis] != 0, axis=(1, 2))
            made[axis] = select(known, previous, old)
        return made, previous

    def apply(
        group: Group,
        step: Step,
        factors: ByAxis,
        inverses: ByAxis,
        weights: Weights,
    ):
        # G x_1 H_1^(-1/p) ... x_k H_k^(-1/p)
        u = step.tensors[group.name]
        p = power_of(group, root)
        for i in range(len(group.block)):
            # a diagonal axis has no entry among the inverses
            matrices = inverses.get(str(i))
            if matrices is None:
                matrices = diagonal_root(factors[str(i)], p, step.value("ridge"))
            u = along(u, i, matrices)
        if root is not None:
            return u
        # the bound is that of p = 2 k
        _, new = weights
        return no_longer_than_fresh(group, u, new)

    return Phases(start, averaged_in, apply, refresh)


def power_of(group: Group, root: int | None) -> int:
    """`p` of the roots `H^(-1/p)`."""
    # k axes with the root 2 k each: together the inverse root
    axes = len(group.block)
    return 2 * axes if root is None else root
