"""TNT: the natural gradient of a tensor-normal model, from gradients at sampled labels."""

from collections.abc import Callable
from typing import Any

import optax

from kfac_optax._types import Numeric, ScalarOrSchedule
from kfac_optax._validate import check_number
from kfac_optax.methods.gradient.axes import DIAGONAL, FULL, Rules, check_rules
from kfac_optax.methods.gradient.momenta import graft_then_momentum
from kfac_optax.methods.gradient.phases import by_phases
from kfac_optax.methods.gradient.tensor_normal import tensor_normal


def scale_by_tnt(
    *,
    damping: ScalarOrSchedule = 1e-3,
    decay: ScalarOrSchedule = 0.95,
    inverse_every: ScalarOrSchedule = 10,
    examples: Numeric | None = None,
    momentum: ScalarOrSchedule | None = None,
    max_dim: int = 1024,
    merge: int = 16,
    long_axes: str = "split",
    vectors: str = "full",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient with the Fisher matrix of every leaf a Kronecker product over its axes.

    `F_i` averages `mat_i(g) mat_i(g)^T` of gradients `g` at labels drawn from the model, `k` is the
    number of axes `n_1, ..., n_k` and `s = tr F_i`, the same for all axes. If `g` is tensor-normal
    its covariance is `F_1 (x) ... (x) F_k / s^(k-1)`, and with `A_i = F_i / s^((k-1)/k)` the update
    is

    `U = G x_1 (A_1 + l_1 I)^{-1} ... x_k (A_k + l_k I)^{-1}`, `l_i = damping^(1/k) n / n_i`,

    `n` the geometric mean of all `n_i`: for a matrix this is the damping that K-FAC's factors share
    between them, for a vector the damped Fisher matrix itself. `update` needs the extra argument
    `sampled_grads`. Leaves are seen as in `scale_by_shampoo`, and what is not finite is treated
    the same way; sampled gradients that are not finite are left out and counted. A tensor of which a
    refresh knows nothing keeps its inverses, the identity at first.

    Args:
      damping: Tikhonov damping, positive.
      decay: bound of the averaging weight.
      inverse_every: period of the inverses, in steps.
      examples: number of examples that `sampled_grads` is a mean over; `None` where it has an axis
        of examples.
      momentum: `M <- momentum M + U` is the update; `None` keeps no trace.
      max_dim: as in `scale_by_shampoo`.
      merge: as in `scale_by_shampoo`.
      long_axes: as in `scale_by_shampoo`.
      vectors: as in `scale_by_shampoo`.
      stacked: as in `scale_by_shampoo`.

    Returns:
      A transformation with an `AxiswiseState`. Its `update` takes `sampled_grads`, a tree like the
      parameters: gradients of the negative log-likelihood at labels drawn from the model. Either
      with an axis of examples in front of every leaf, or the mean over `examples`, as
      `fisher.at(...).sampled_gradient()` gives it, `examples` times the product of which is
      unbiased.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range; gradients of other parameters than `init` got;
        `sampled_grads` is missing or has other shapes.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_tnt(damping=1.0)
    >>> g = jnp.array([2.0, 1.0])
    >>> updates, state = tx.update(g, tx.init(g), sampled_grads=jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    >>> print(updates.round(3))  # F = diag(1, 0)
    [1. 1.]

    Reference: Ren & Goldfarb, Tensor Normal Training for Deep Learning Models (2021).
    """
    where = "scale_by_tnt"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked)
    check_rules(where, rules, ("split", DIAGONAL), (FULL, DIAGONAL))
    check_number(where, "damping", damping, above=0, schedule=True)
    if examples is not None:
        check_number(where, "examples", examples, above=0)
    hyper: dict[str, Any] = dict(damping=damping, decay=decay, inverse_every=inverse_every)
    if momentum is not None:
        hyper["momentum"] = momentum
    # a natural gradient has a length of its own: nothing is grafted
    finish = graft_then_momentum(None, momentum=momentum is not None)
    return by_phases(where, rules, hyper, tensor_normal(examples), finish)
