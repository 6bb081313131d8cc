"""Sketchy: Shampoo with a few directions of every statistic and a bound on the rest."""

from collections.abc import Callable
from typing import Any

import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax.methods.gradient.axes import DIAGONAL, FULL, Rules, check_rules
from kfac_optax.methods.gradient.momenta import graft_of, graft_then_momentum
from kfac_optax.methods.gradient.phases import by_phases
from kfac_optax.methods.gradient.shampoo_phases import check_root
from kfac_optax.methods.gradient.sketches import sketches
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

    >>> import jax.numpy as jnp
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
    return by_phases(where, rules, hyper, sketches(rank, root), finish)
