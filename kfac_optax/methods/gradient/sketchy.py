"""Sketchy: Shampoo with a few directions of every statistic and a bound on the rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax.linalg.factorize import after
from kfac_optax.linalg.frequent_directions import (
    Sketch,
    absorb_columns,
    no_sketch,
    root_weights,
)
from kfac_optax.methods.gradient.axes import (
    DIAGONAL,
    FULL,
    Group,
    Rules,
    along,
    check_rules,
    statistic,
    unfolded,
)
from kfac_optax.methods.gradient.axiswise import Step
from kfac_optax.methods.gradient.length import no_longer_than_fresh
from kfac_optax.methods.gradient.momenta import graft_of, graft_then_momentum
from kfac_optax.methods.gradient.phases import (
    ByAxis,
    Phases,
    Weights,
    by_phases,
    diagonal_root,
    zeros_by_axis,
)
from kfac_optax.methods.gradient.shampoo import check_root, power_of
from kfac_optax.methods.signature import check_size


def scale_by_sketchy(
    *,
    rank: int = 128,
    decay: ScalarOrSchedule = 0.999,
    ridge: ScalarOrSchedule = 1e-6,
    curvature_every: ScalarOrSchedule = 1,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    graft: str | optax.GradientTransformation | None = None,
    root: int | None = None,
    max_dim: int = 1024,
    merge: int = 16,
    long_axes: str = "split",
    vectors: str = "full",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo with the statistic `H_i` of every axis kept as `rank` directions and a number.

    `U diag(D) U^T <= H_i <= U diag(D) U^T + rho I` at every step, by frequent directions: of the
    singular values `sigma` of `[sqrt(e D) U, sqrt(1 - e) mat_i(G)]` the first `rank` are kept,
    `c = sigma_{rank+1}^2` is taken off their squares, and `rho <- e rho + c`. The gradient is
    preconditioned by the roots of the upper bounds,

    `(U diag(D) U^T + rho I)^(-1/p) = U [(D + rho)^(-1/p) - rho^(-1/p)] U^T + rho^(-1/p) I`,

    `p` twice the number of axes; without `root` the update is no longer than a sketch of this very
    gradient could make it, as in `scale_by_shampoo`. Axes not longer than `rank` are those of `scale_by_shampoo` with
    roots of every step; a vector gives S-AdaGrad. An axis of length `n` with `m` entries of the
    others takes an eigendecomposition of a matrix of `min(n, rank + m)` rows whenever it is
    measured, and `n rank + rank + 1` numbers in place of `2 n^2`.

    Args:
      rank: directions that are kept of an axis.
      decay: bound of the averaging weight; 1 sums.
      ridge: added before the root, relative to the largest eigenvalue of the bound.
      curvature_every: period of the sketches, in steps.
      momentum: as in `scale_by_shampoo`.
      nesterov: as in `scale_by_shampoo`.
      graft: as in `scale_by_distributed_shampoo`; `None` leaves norms as they are.
      root: `p` of the roots; default twice the number of axes.
      max_dim: as in `scale_by_shampoo`.
      merge: as in `scale_by_shampoo`.
      long_axes: as in `scale_by_shampoo`.
      vectors: as in `scale_by_shampoo`.
      stacked: as in `scale_by_shampoo`.

    Returns:
      A transformation with an `AxiswiseState`, whose factors are `Sketch`es.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> tx = scale_by_sketchy(rank=1, ridge=0.0)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3) + 0)  # of both axes D = 9 - 0.25 and rho = 0.25
    [[ 1.  0.]
     [ 0. -1.]]

    Reference: Feinberg, Chen, Sun, Anil & Hazan, Sketchy: Memory-efficient Adaptive Regularization
      with Frequent Directions (2023), algorithm 3.
    """
    where = "scale_by_sketchy"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked)
    check_rules(where, rules, ("split", DIAGONAL), (FULL, DIAGONAL))
    check_size(where, "rank", rank)
    check_root(where, root)
    hyper: dict[str, Any] = dict(decay=decay, ridge=ridge, curvature_every=curvature_every)
    if momentum is not None:
        hyper["momentum"] = momentum
    lengths = graft_of(where, graft)
    # the norm of another optimizer's step, then momentum
    finish = graft_then_momentum(lengths, momentum=momentum is not None, nesterov=nesterov)
    return by_phases(where, rules, hyper, _sketches(rank, root), finish)


def _sketches(rank: int, root: int | None) -> Phases:
    """Sketches for statistics; their roots cost no more than the product with them."""

    def start(group: Group, dtype: Any) -> tuple[ByAxis, ByAxis]:
        factors = zeros_by_axis(group, dtype)  # diagonals stay what they are in Shampoo
        # U D U^T + rho I, [copies, n, rank] and what goes with it
        for i in group.axes_of(FULL):
            one = no_sketch(group.block[i], rank, dtype)
            factors[str(i)] = jax.tree.map(
                lambda x: jnp.tile(x, (group.copies,) + x.ndim * (1,)), one
            )
        return factors, {}

    def take_in(
        group: Group,
        tensors: jax.Array,
        factors: ByAxis,
        weights: Weights,
    ) -> ByAxis:
        out: ByAxis = {}
        for i, kind in enumerate(group.kinds):
            old = factors[str(i)]
            if kind == FULL:
                # the columns of [sqrt(e D) U, sqrt(1 - e) mat_i(G)], by their singular values
                absorb = jax.vmap(absorb_columns, in_axes=(0, 0, None, None))
                # one batched factorisation after another
                columns = after(unfolded(tensors, i), out)
                out[str(i)] = absorb(old, columns, *weights)
            else:
                # H_i <- e H_i + (1 - e) diag(mat_i(G) mat_i(G)^T)
                out[str(i)] = weights[0] * old + weights[1] * statistic(tensors, i, kind)
        return out

    def apply(
        group: Group,
        step: Step,
        factors: ByAxis,
        inverses: ByAxis,
        weights: Weights,
    ):
        # G x_1 H_1^(-1/p) ... x_k H_k^(-1/p)
        u, p, ridge = step.tensors[group.name], power_of(group, root), step.value("ridge")
        for i, kind in enumerate(group.kinds):
            own = factors[str(i)]
            u = (
                _times_root(u, i, own, p, ridge)
                if kind == FULL
                else along(u, i, diagonal_root(own, p, ridge))
            )
        # a gradient that no sketch has seen, between two of them or too large to be squared
        return u if root is not None else no_longer_than_fresh(group, u, weights[1])

    return Phases(start, take_in, apply, in_turn=True)


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
        return along(along(turned, axis, inside), axis, directions)
    # U [(D + rho)^(-1/p) - rho^(-1/p)] U^T G + rho^(-1/p) G
    change = along(along(turned, axis, inside - outside[:, None]), axis, directions)
    return change + outside.reshape(-1, *[1] * (tensors.ndim - 1)) * tensors
