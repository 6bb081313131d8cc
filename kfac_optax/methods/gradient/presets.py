"""Whole optimizers that need gradients alone."""

from typing import Any

import optax

from kfac_optax._types import Numeric, ScalarOrSchedule
from kfac_optax._validate import check_legal
from kfac_optax.methods.gradient.eva_s import scale_by_eva_s
from kfac_optax.methods.gradient.shampoo import scale_by_shampoo
from kfac_optax.methods.gradient.soap import scale_by_soap
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.kl_clip import clip_by_kl


@flat_signature(scale_by_shampoo)
def shampoo(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ScalarOrSchedule | None = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo, a whole optimizer: `scale_by_shampoo`, decoupled weight decay, and the step.

    `theta <- theta - learning_rate (M + weight_decay theta)`, with `M` the trace of the
    preconditioned gradients. It needs a parameter tree and gradients, nothing else. With sums of
    statistics (`decay=1`) steps shrink as `1/sqrt(t)`, as those of AdaGrad do; with an average their
    size stays, so a schedule belongs to it. `graft="adam"` takes over a rate tuned for Adam.

    Args:
      learning_rate: number or schedule.
      momentum: of the preconditioned gradients; `None` for none.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      **options: as for `scale_by_shampoo`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = shampoo(learning_rate=0.1, ridge=0.0)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3) + 0)
    [[-0.1  0. ]
     [ 0.   0.1]]

    Reference: Gupta, Koren & Singer, Shampoo: Preconditioned Stochastic Tensor Optimization (2018),
      algorithm 2.
    """
    preconditioner = scale_by_shampoo(momentum=momentum, **options)
    return _with_step("shampoo", preconditioner, learning_rate, weight_decay)


@flat_signature(scale_by_soap)
def soap(
    learning_rate: ScalarOrSchedule, *, weight_decay: ScalarOrSchedule = 0.0, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """SOAP, a whole optimizer: `scale_by_soap`, decoupled weight decay, and the step.

    `theta <- theta - learning_rate (U + weight_decay theta)`, with `U` the update of Adam in
    Shampoo's eigenbasis. It needs a parameter tree and gradients, nothing else; rates are those of
    Adam. The first step only finds the bases.

    Args:
      learning_rate: number or schedule.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero. The paper
        takes 0.01.
      **options: as for `scale_by_soap`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = soap(learning_rate=0.1)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> _, state = tx.update(g, tx.init(g))
    >>> updates, state = tx.update(g, state)
    >>> print(updates.round(3) + 0)
    [[-0.1  0. ]
     [ 0.   0.1]]

    Reference: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam (2024), algorithm 3.
    """
    return _with_step("soap", scale_by_soap(**options), learning_rate, weight_decay)


@flat_signature(scale_by_eva_s)
def eva_s(
    learning_rate: ScalarOrSchedule,
    *,
    kl_clip: ScalarOrSchedule | None = 1e-3,
    momentum: Numeric | None = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Eva-s, a whole optimizer: `scale_by_eva_s`, KL-clip, decoupled weight decay, momentum, and
    the step.

    `theta <- theta - learning_rate M`, with `M` the trace of `nu U + weight_decay theta`, `U` the
    preconditioned gradient and `nu` the factor of `clip_by_kl`. It needs a parameter tree and
    gradients, nothing else.

    Args:
      learning_rate: number or schedule.
      kl_clip: bound on `learning_rate^2 <U, V>`; `None` for none.
      momentum: of the clipped updates; `None` for none.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      **options: as for `scale_by_eva_s`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = eva_s(learning_rate=0.1, damping=1.0, kl_clip=None)
    >>> g = jnp.array([[2.0, 0.0], [0.0, 0.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates + 0)
    [[-0.1  0. ]
     [ 0.   0. ]]

    Reference: Zhang, Shi & Li, Eva: Practical Second-order Optimization with Kronecker-vectorized
      Approximation (2023).
    """
    clipped = clip_by_kl(scale_by_eva_s(**options), learning_rate=learning_rate, kl_clip=kl_clip)
    return _with_step("eva_s", clipped, learning_rate, weight_decay, momentum)


def _with_step(
    where: str,
    preconditioner: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    momentum: Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioner, decoupled weight decay and momentum if there are any, and the rate."""
    check_legal(where, "learning_rate", learning_rate)
    check_legal(where, "weight_decay", weight_decay)
    parts = [preconditioner]
    if not isinstance(weight_decay, (int, float)) or weight_decay != 0:
        parts.append(optax.add_decayed_weights(weight_decay))
    if momentum is not None:
        if callable(momentum):
            raise TypeError(f"{where}: momentum is a schedule; expected a number, or None.")
        check_legal(where, "momentum", momentum)
        parts.append(optax.trace(momentum))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
