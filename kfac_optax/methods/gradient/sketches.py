"""What Sketchy does with every axis: sketches of statistics, and products with their roots."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.linalg.frequent_directions import (
    Sketch,
    absorb_columns,
    no_sketch,
    root_weights,
)
from kfac_optax.linalg.in_order import after
from kfac_optax.methods.gradient.axes import FULL, Group
from kfac_optax.methods.gradient.axis_products import along, statistic, unfolded
from kfac_optax.methods.gradient.axiswise import Step
from kfac_optax.methods.gradient.length import no_longer_than_fresh
from kfac_optax.methods.gradient.phases import (
    ByAxis,
    Phases,
    Weights,
    diagonal_root,
    zeros_by_axis,
)
from kfac_optax.methods.gradient.shampoo_phases import power_of


def sketches(rank: int, root: int | None) -> Phases:
    """Sketches for statistics; their roots cost no more than the product with them."""

    def start(group: Group, dtype: Any) -> tuple[ByAxis, ByAxis]:
        factors = zeros_by_axis(group, dtype)  # diagonals stay what they are in Shampoo
        # U D U^T + rho I, [copies, n, rank] and what goes with it
        for i in group.axes_of(FULL):
            one = no_sketch(group.block[i], rank, dtype)
            factors[str(i)] = jax.tree.map(lambda x: _repeated(x, group.copies), one)
        return factors, {}

    def take_in(
        group: Group,
        tensors: jax.Array,
        factors: ByAxis,
        weights: Weights,
    ) -> ByAxis:
        held, new = weights
        # the columns of [sqrt(e D) U, sqrt(1 - e) mat_i(G)], by their singular values
        absorb = jax.vmap(absorb_columns, in_axes=(0, 0, None, None))
        out: ByAxis = {}
        for i, kind in enumerate(group.kinds):
            old = factors[str(i)]
            if kind == FULL:
                # one batched factorisation after another
                columns = after(unfolded(tensors, i), out)
                out[str(i)] = absorb(old, columns, held, new)
            else:
                # H_i <- e H_i + (1 - e) diag(mat_i(G) mat_i(G)^T)
                squares = statistic(tensors, i, kind)
                out[str(i)] = held * old + new * squares
        return out

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
        ridge = step.value("ridge")
        for i, kind in enumerate(group.kinds):
            own = factors[str(i)]
            if kind == FULL:
                u = _times_root(u, i, own, p, ridge)
            else:
                roots = diagonal_root(own, p, ridge)
                u = along(u, i, roots)
        if root is not None:
            return u
        # a gradient that no sketch has seen, between two of them or too large to be squared
        _, new = weights
        return no_longer_than_fresh(group, u, new)

    return Phases(start, take_in, apply, in_turn=True)


def _repeated(x: jax.Array, copies: int) -> jax.Array:
    """The same array for every copy, `[copies, ...]`."""
    return jnp.tile(x, (copies,) + x.ndim * (1,))


def _times_root(
    tensors: jax.Array,
    axis: int,
    sketch: Sketch,
    p: int,
    ridge: jax.Array,
):
    """`G x_i (U D U^T + rho I)^(-1/p)`; no matrix of the size of the axis is formed."""
    # [copies, rank] within the directions, [copies] without
    inside, outside = jax.vmap(lambda s: root_weights(s, p, ridge))(sketch)
    directions = sketch.low.vectors
    # coordinates in the directions, U^T mat_i(G)
    turned = along(tensors, axis, directions.mT)
    if directions.shape[1] == directions.shape[2]:  # nothing is left out
        scaled = along(turned, axis, inside)
        return along(scaled, axis, directions)
    # U [(D + rho)^(-1/p) - rho^(-1/p)] U^T G + rho^(-1/p) G
    scaled = along(turned, axis, inside - outside[:, None])
    change = along(scaled, axis, directions)
    each = outside.reshape(-1, *[1] * (tensors.ndim - 1))
    return change + each * tensors
