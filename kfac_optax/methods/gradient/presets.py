"""Whole optimizers that need gradients alone."""

from collections.abc import Callable

import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax._validate import check_legal
from kfac_optax.methods.gradient.shampoo import scale_by_shampoo
from kfac_optax.methods.gradient.soap import scale_by_soap


def shampoo(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ScalarOrSchedule | None = 0.9,
    nesterov: bool = False,
    weight_decay: ScalarOrSchedule = 0.0,
    decay: ScalarOrSchedule = 1.0,
    ridge: ScalarOrSchedule = 1e-6,
    inverse_every: ScalarOrSchedule = 10,
    graft: str | optax.GradientTransformation | None = None,
    root: int | None = None,
    inverse: str = "eigh",
    max_dim: int = 1024,
    merge: int = 16,
    long_axes: str = "split",
    vectors: str = "full",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo, a whole optimizer: `scale_by_shampoo`, decoupled weight decay, and the step.

    `theta <- theta - learning_rate (M + weight_decay theta)`, with `M` the trace of the
    preconditioned gradients. It needs a parameter tree and gradients, nothing else. With sums of
    statistics (`decay=1`) steps shrink as `1/sqrt(t)`, as those of AdaGrad do; with an average their
    size stays, so a schedule belongs to it. `graft="adam"` takes over a rate tuned for Adam.

    Args:
      learning_rate: number or schedule.
      momentum: of the preconditioned gradients; `None` for none.
      nesterov: Nesterov's momentum.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      decay: see `scale_by_shampoo`, as all that follow.
      ridge: relative to the largest eigenvalue of each statistic.
      inverse_every: period of the roots.
      graft: `"sgd"`, `"adam"`, `"rms"`, a transformation or `None`.
      root: `p` of the roots; default twice the number of axes.
      inverse: `"eigh"` or `"newton"`.
      max_dim: axes longer than this are long.
      merge: bound of the product of axes that are merged.
      long_axes: `"split"` or `"diagonal"`.
      vectors: `"full"` or `"diagonal"`.
      stacked: `name -> number` of leading axes that only count equal parameters.

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
    preconditioner = scale_by_shampoo(
        decay=decay,
        ridge=ridge,
        inverse_every=inverse_every,
        momentum=momentum,
        nesterov=nesterov,
        graft=graft,
        root=root,
        inverse=inverse,
        max_dim=max_dim,
        merge=merge,
        long_axes=long_axes,
        vectors=vectors,
        stacked=stacked,
    )
    return _with_step("shampoo", preconditioner, learning_rate, weight_decay)


def soap(
    learning_rate: ScalarOrSchedule,
    *,
    b1: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    decay: ScalarOrSchedule = 0.95,
    inverse_every: ScalarOrSchedule = 10,
    basis: str = "qr",
    max_dim: int = 4096,
    merge: int = 16,
    long_axes: str = "identity",
    vectors: str = "identity",
    stacked: Callable[[str], int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP, a whole optimizer: `scale_by_soap`, decoupled weight decay, and the step.

    `theta <- theta - learning_rate (U + weight_decay theta)`, with `U` the update of Adam in
    Shampoo's eigenbasis. It needs a parameter tree and gradients, nothing else; rates are those of
    Adam. The first step only finds the bases.

    Args:
      learning_rate: number or schedule.
      b1: decay of the mean of the gradients.
      b2: decay of the mean of the squares in the bases.
      eps: added to the root.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero. The paper
        takes 0.01.
      decay: of the statistics, see `scale_by_soap`, as all that follow.
      inverse_every: period of the bases.
      basis: `"qr"` or `"eigh"`.
      max_dim: axes longer than this are long.
      merge: bound of the product of axes that are merged.
      long_axes: `"identity"` or `"split"`.
      vectors: `"identity"` (Adam) or `"full"`.
      stacked: `name -> number` of leading axes that only count equal parameters.

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
    preconditioner = scale_by_soap(
        b1=b1,
        b2=b2,
        eps=eps,
        decay=decay,
        inverse_every=inverse_every,
        basis=basis,
        max_dim=max_dim,
        merge=merge,
        long_axes=long_axes,
        vectors=vectors,
        stacked=stacked,
    )
    return _with_step("soap", preconditioner, learning_rate, weight_decay)


def _with_step(
    where: str,
    preconditioner: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioner, decoupled weight decay if there is any, and the rate."""
    check_legal(where, "learning_rate", learning_rate)
    check_legal(where, "weight_decay", weight_decay)
    parts = [preconditioner]
    if not isinstance(weight_decay, (int, float)) or weight_decay != 0:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
