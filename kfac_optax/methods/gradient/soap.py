"""SOAP: Adam in the eigenbasis of Shampoo's statistics."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import Checked, check_choice
from kfac_optax.engine.state import GradientCounts
from kfac_optax.methods.gradient.axes import ALL, FULL, IDENTITY, Rules, check_rules
from kfac_optax.methods.gradient.axiswise import Axiswise, transformation
from kfac_optax.methods.gradient.kl_statistics import OUTER, checked_decay
from kfac_optax.methods.gradient.soap_bases import BASES
from kfac_optax.methods.gradient.soap_step import start_moments, step_in_bases


class SoapState(NamedTuple):
    """State of `scale_by_soap`. Tensors of equal shape are stacked on axis 0."""

    counts: GradientCounts
    factors: Any  # by group and axis: [copies, n, n]
    bases: Any  # orthogonal matrices by group and axis, [copies, n, n], a direction per column
    mu: Any  # mean of the gradients by group, [copies, *shape]
    nu: Any  # mean of the squares by group, in the bases
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def scale_by_soap(
    *,
    b1: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    decay: ScalarOrSchedule = 0.95,
    inverse_every: ScalarOrSchedule = 10,
    basis: str = "qr",
    statistics: str = OUTER,
    max_dim: int = 4096,
    merge: int = 16,
    long_axes: str = "identity",
    vectors: str = "identity",
    sides: str = ALL,
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of Shampoo's statistics.

    For a matrix `G`, with `L` and `R` the averages of `G G^T` and `G^T G` and `Q_L`, `Q_R` their
    eigenvectors:

    `M <- b1 M + (1 - b1) G`,
    `V <- b2 V + (1 - b2) (Q_L^T G Q_R)^2`,
    `U = Q_L [Q_L^T M Q_R / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)] Q_R^T`.

    The bases are eigenvectors at the first step and then follow by one step of the power iteration
    each time they are due, `Q <- qr(L Q)`, with columns, and the entries of `V` with them, in
    descending order of `diag(Q^T L Q)`. Tensors of more axes have a basis for each. An axis that is
    longer than `max_dim` has none (the one-sided form), nor have vectors and scalars: where no axis
    has one this is Adam.

    A step is taken in the bases that earlier gradients made; then come statistics, and bases where
    they are due. In a basis of its own a gradient is diagonal up to rounding, and Adam would make
    rounding as large as the rest. So the first gradient of a tensor with a basis makes that and
    nothing else: its update is zero, and `t` counts from the second. Where no axis has a basis the
    first step is Adam's. Leaves are seen as in `scale_by_shampoo`, and what is not finite is treated
    the same way: a bad gradient changes nothing, a basis that fails is kept.

    Args:
      b1: decay of the mean of the gradients.
      b2: decay of the mean of the squares in the bases.
      eps: added to the root.
      decay: of the statistics, `L <- e L + (1 - e) G G^T`, `e = min(1 - 1/t, decay)`; 1 sums them.
      inverse_every: period of the bases, in steps.
      basis: `"qr"`, the power iteration; `"eigh"`, eigenvectors every time.
      statistics: `"outer"`, those above; `"kl"`, those whose product is nearest to the second
        moment of the gradient, `L <- e L + (1 - e) G R^(-1) G^T / q` and the same of `R` with
        `R^(-1) = Q_R diag(Q_R^T R Q_R)^(-1) Q_R^T`, for averages (KL-SOAP).
      max_dim: axes longer than this are long.
      merge: neighbouring axes are merged, from the left, while their product is at most this and
        two axes are left; 1 merges none.
      long_axes: `"identity"` gives a long axis no basis, `"split"` cuts it into equal pieces.
      vectors: `"identity"` (Adam) or `"full"`, for leaves with one axis.
      sides: `"all"` axes have a basis, or the `"short"` one alone, the first of equally short ones
        (the one-sided form).
      stacked: `name -> number` of leading axes that only count equal parameters, as those of
        scanned layers; default none. Names are paths, `"block/kernel"`.

    Returns:
      A transformation whose state is a `SoapState` of arrays in float32 or wider; updates have the
      dtypes of the gradient.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_soap()
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> _, state = tx.update(g, tx.init(g))
    >>> updates, state = tx.update(g, state)
    >>> print(updates.round(3) + 0)
    [[ 1.  0.]
     [ 0. -1.]]

    Reference: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson & Kakade, SOAP: Improving
      and Stabilizing Shampoo using Adam (2024), algorithm 3; Lin, Lowe, Dangel, Eschenhagen, Xu &
      Grosse, Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization (2025),
      for `"kl"`.
    """
    where = "scale_by_soap"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked, sides)
    check_rules(where, rules, (IDENTITY, "split"), (IDENTITY, FULL))
    check_choice(where, "basis", basis, BASES)
    decay = checked_decay(where, statistics, decay)
    hyper: dict[str, Any] = dict(b1=b1, b2=b2, eps=eps, decay=decay, inverse_every=inverse_every)

    advance = functools.partial(step_in_bases, basis=basis, statistics=statistics)
    return transformation(Axiswise(where, rules, hyper, SoapState, "mu", start_moments, advance))
