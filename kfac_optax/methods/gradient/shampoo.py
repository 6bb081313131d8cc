"""Shampoo: every axis of a tensor preconditioned by the root of its own second moment."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import Checked, check_choice
from kfac_optax.engine.state import GradientCounts
from kfac_optax.linalg.roots import METHODS
from kfac_optax.methods.gradient.axes import DIAGONAL, FULL, Rules, check_rules
from kfac_optax.methods.gradient.kl_phases import kl_phases
from kfac_optax.methods.gradient.kl_statistics import KL, OUTER, checked_decay
from kfac_optax.methods.gradient.momenta import graft_of, graft_then_momentum
from kfac_optax.methods.gradient.phases import Phases, by_phases
from kfac_optax.methods.gradient.shampoo_phases import check_root, shampoo_phases


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`. Tensors of equal shape are stacked on axis 0."""

    counts: GradientCounts
    factors: Any  # by group and axis: [copies, n, n], or [copies, n] of a diagonal axis
    inverses: Any  # roots by group and axis, [copies, n, n]
    trace: Any  # momentum by group, [copies, *shape], or ()
    graft: PyTree  # state of the transformation that gives the norm, or ()
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def scale_by_shampoo(
    *,
    decay: ScalarOrSchedule = 1.0,
    ridge: ScalarOrSchedule = 1e-6,
    inverse_every: ScalarOrSchedule = 10,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    graft: str | optax.GradientTransformation | None = None,
    root: int | None = None,
    statistics: str = OUTER,
    inverse: str = "eigh",
    max_dim: int = 1024,
    merge: int = 16,
    long_axes: str = "split",
    vectors: str = "full",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions every axis of a gradient with the root of its second moment.

    For a leaf seen as a tensor `G [n_1, ..., n_k]`, and `mat_i(G) [n_i, rest]` its unfolding:

    `H_i <- H_i + mat_i(G) mat_i(G)^T`,
    `U = G x_1 H_1^(-1/2k) x_2 ... x_k H_k^(-1/2k)`.

    A matrix gives `L^(-1/4) G R^(-1/4)`, a vector full-matrix AdaGrad, a scalar AdaGrad. What leaves
    are is read from their shapes: axes of length one vanish, short neighbouring axes are merged
    (a 3x3 kernel has one axis of length 9 for both), long ones split. No layers and no curvature
    are needed. Leaves without entries pass on; leaves of one shape share batched calls.

    Statistics come first, then roots where they are due, then the step is preconditioned. A gradient
    that is not finite changes nothing and gives a zero update; a root that fails, or of a statistic
    that is still zero, keeps the last good one, the identity at first; both are counted, and
    `problems` names them. Periods and schedules count accepted gradients. Roots that are not of this
    step know nothing of new directions and would blow them up, so no tensor's update is longer than
    roots of this step could make it: `||U||^2 <= (r_1 ... r_k)^(1/k) / w`, with `r_i` the largest
    rank of `mat_i(G)` and `w` the weight of this step in the statistics (not with a `root` of your
    own, where such a bound depends on the scale).

    Args:
      decay: 1 sums the statistics (the paper); less averages them,
        `H <- e H + (1 - e) mat mat^T` with `e = min(1 - 1/t, decay)`.
      ridge: added to every statistic before its root, relative to its largest eigenvalue.
      inverse_every: period of the roots, in steps.
      momentum: `M <- momentum M + U` is the update; `None` keeps no trace.
      nesterov: the update is `momentum M + U`.
      graft: every leaf's update gets the norm of that of `"sgd"`, `"adam"`, `"rms"`, `"adagrad"`,
        `"sign"`, one of these with `_normalized` (of every leaf divided by its norm), or a
        transformation; `None` leaves it. It gets the gradient in the dtype of the state. Each layer
        of a stacked leaf has a norm of its own.
      root: `p` of `H^(-1/p)`; default twice the number of axes. 2 gives `L^(-1/2) G R^(-1/2)`.
      statistics: `"outer"`, those above; `"kl"`, those whose product is nearest to the second
        moment of the gradient (KL-Shampoo), `L <- e L + (1 - e) G R^(-1) G^T / q` and
        `R <- e R + (1 - e) G^T L^(-1) G / p` of a matrix `[p, q]`, for averages. `R^(-1)` and
        `L^(-1)` are of the last roots, all roots are square roots, `L^(-1/2) G R^(-1/2)`, and no
        update has a mean square above `1 / w`. `L` and `R` are kept with equal mean diagonal
        entries, as the product alone is determined. Keep `inverse_every` below the `1 / (1 - decay)`
        steps that an average remembers.
      inverse: `"eigh"` or `"newton"`, see `inverse_root`.
      max_dim: axes longer than this are long.
      merge: neighbouring axes are merged, from the left, while their product is at most this and
        two axes are left; 1 merges none.
      long_axes: `"split"` cuts a long axis into equal pieces, each a problem of its own;
        `"diagonal"` keeps the diagonal of its statistic, which is never stale.
      vectors: `"full"` or `"diagonal"` (AdaGrad), for leaves with one axis.
      stacked: `name -> number` of leading axes that only count equal parameters, as those of
        scanned layers; default none. Names are paths, `"block/kernel"`.

    Returns:
      A transformation whose state is a `ShampooState` of arrays in float32 or wider; updates have
      the dtypes of the gradient.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_shampoo(ridge=0.0)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3) + 0)
    [[ 1.  0.]
     [ 0. -1.]]

    References: Gupta, Koren & Singer, Shampoo: Preconditioned Stochastic Tensor Optimization
      (2018), algorithm 2; Anil, Gupta, Koren, Regan & Singer, Scalable Second Order Optimization
      for Deep Learning (2020), for averages, splitting, Newton's iteration and grafting; Lin, Lowe,
      Dangel, Eschenhagen, Xu & Grosse, Understanding and Improving Shampoo and SOAP via
      Kullback-Leibler Minimization (2025), for `"kl"`; how gradients begin to count there is this
      library's.
    """
    where = "scale_by_shampoo"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked)
    check_rules(where, rules, ("split", DIAGONAL), (FULL, DIAGONAL))
    check_choice(where, "inverse", inverse, METHODS)
    check_root(where, root)
    decay = checked_decay(where, statistics, decay, root)
    hyper: dict[str, Any] = dict(decay=decay, ridge=ridge, inverse_every=inverse_every)
    if momentum is not None:
        hyper["momentum"] = momentum
    # the length of the step first, so that momentum adds up grafted steps
    finish = graft_then_momentum(
        graft_of(where, graft), momentum=momentum is not None, nesterov=nesterov
    )
    phases = phases_of(statistics, root, inverse)
    return by_phases(where, rules, hyper, phases, finish, state=ShampooState)


def phases_of(statistics: str, root: int | None, inverse: str) -> Phases:
    """Those of `"outer"` statistics, or of `"kl"`, whose roots are square roots."""
    if statistics == KL:
        return kl_phases(shampoo_phases(2, inverse))
    return shampoo_phases(root, inverse)
