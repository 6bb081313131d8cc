"""Jorge: the roots of Shampoo followed by products of matrices, never computed."""

from collections.abc import Callable
from typing import Any

import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import check_choice, check_number
from kfac_optax.methods.gradient.axes import DIAGONAL, FULL, Rules, check_rules
from kfac_optax.methods.gradient.jorge_roots import followed_roots
from kfac_optax.methods.gradient.momenta import momentum_then_graft
from kfac_optax.methods.gradient.phases import by_phases


def scale_by_jorge(
    *,
    momentum: ScalarOrSchedule = 0.9,
    decay: ScalarOrSchedule = 0.0,
    eps: float = 1e-6,
    inverse_every: ScalarOrSchedule = 10,
    graft: str | None = "sgd",
    max_dim: int = 1024,
    merge: int = 16,
    long_axes: str = "split",
    vectors: str = "full",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo whose inverse roots follow the statistics by a series, without factorisations.

    Of every axis the root `R ~ H^(-1/p)` is kept, `p` twice the number of axes, and where it is due
    it follows `H <- b H + (1 - b) mat(G) mat(G)^T`: with `X = R^p mat(G) mat(G)^T`,
    `Y = X (1 - b) / b` and the binomial series `T = I - Y / 2p + (2p + 1) Y^2 / 8p^2` of
    `(I + Y)^(-1/2p)`,

    `R <- b^(-1/p) T^T R T`.

    Where `R` and the statistic commute this is the root up to `O(||Y||^3)`, else up to `O(||Y||)`.
    The paper multiplies by the series of `(I + Y)^(-1/p)` from one side. That has the same first
    order, but it is not symmetric, and made symmetric it need not stay positive definite; `T^T R T`
    does. The weight is `b = max(decay, ||X|| / (1 + ||X||))`, so that `||Y|| <= 1`, where the
    series can be used. With `M` and `N` the momenta of the preconditioned gradient and of the
    gradient, every leaf's update is `M ||N|| / ||M||`. Leaves are seen as in `scale_by_shampoo`, and
    what is not finite is treated the same way; the root of a statistic that is zero stays.

    Args:
      momentum: `M <- momentum M + U`, and the same of the gradient.
      decay: least weight of what is held; 0 leaves it to `||Y|| = 1`.
      eps: roots start as `eps^(-1/p) I`.
      inverse_every: period of the roots, in steps: the gradients of other steps have no part.
      graft: `"sgd"` gives each leaf the norm of SGD's update with the same momentum, `None` leaves
        norms as they are.
      max_dim: as in `scale_by_shampoo`.
      merge: as in `scale_by_shampoo`.
      long_axes: as in `scale_by_shampoo`.
      vectors: as in `scale_by_shampoo`.
      stacked: as in `scale_by_shampoo`.

    Returns:
      A transformation with an `AxiswiseState` without factors.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_jorge()
    >>> g = jnp.array([[3.0, 0.0], [0.0, -3.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round().astype(int))
    [[ 3  0]
     [ 0 -3]]

    Reference: Singh, Bhatele et al., Jorge: Approximate Preconditioning for GPU-efficient
      Second-order Optimization (2023).
    """
    where = "scale_by_jorge"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked)
    check_rules(where, rules, ("split", DIAGONAL), (FULL, DIAGONAL))
    check_number(where, "eps", eps, above=0)
    if graft is not None:
        check_choice(where, "graft", graft, ("sgd",))
    hyper: dict[str, Any] = dict(momentum=momentum, decay=decay, inverse_every=inverse_every)
    hyper["eps"] = eps
    # here a decay does not weigh statistics that are kept
    finish = momentum_then_graft(graft=graft is not None)
    return by_phases(where, rules, hyper, followed_roots(eps), finish, groups_in="inverses")
