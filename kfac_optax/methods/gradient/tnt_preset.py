"""Tensor-normal training as a whole optimizer."""

from typing import Any

import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax.methods.gradient.tnt import scale_by_tnt
from kfac_optax.methods.gradient.whole import OF_THE_STEP, entries, matrices, of_leaves, with_step
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature


@flat_signature(scale_by_tnt, schedules=OF_THE_STEP)
def tnt(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ScalarOrSchedule | None = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Tensor-normal training, a whole optimizer: `scale_by_tnt`, decoupled weight decay, and the
    step.

    `theta <- theta - learning_rate (M + weight_decay theta)`, with `M` the trace of the
    preconditioned gradients. `update` needs the extra argument `sampled_grads`, see `scale_by_tnt`.

    Args:
      learning_rate: number or schedule.
      momentum: of the preconditioned gradients; `None` for none.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      **options: as for `scale_by_tnt`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = tnt(learning_rate=0.1, damping=1.0)
    >>> g = jnp.array([2.0, 1.0])
    >>> updates, state = tx.update(g, tx.init(g), sampled_grads=jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    >>> print(updates.round(3))
    [-0.1 -0.1]

    Reference: Ren & Goldfarb, Tensor Normal Training for Deep Learning Models (2021).
    """
    # theta <- theta - rate (U + weight_decay theta)
    preconditioner = scale_by_tnt(momentum=momentum, **options)
    return with_step("tnt", preconditioner, learning_rate, weight_decay)


# a factor and its inverse for every axis, and the momentum
_numbers = of_leaves(lambda shape: 2 * matrices(shape) + entries(shape))

RECORDS = (
    Method(
        name="tnt",
        kind="optimizer",
        summary="natural gradient of a tensor-normal model, from gradients at labels drawn from "
        "the model (`sampled_grads`)",
        paper="Ren & Goldfarb (2021)",
        equation="U = s (F_1 + l_1 I)⁻¹ G (F_2 + l_2 I)⁻¹, s = tr F_i",
        needs=frozenset({"gradient", "sampled"}),
        state=_numbers,
        state_text="2 (p² + q²) + p q; 2 q² + q of a bias",
        cost=("O(d³)", "O(d³)"),
        test="tests/methods/test_tnt.py::test_dense_kronecker_product_of_inverses",
        build=lambda layers, **options: tnt(
            **(dict(learning_rate=0.1, damping=0.05, inverse_every=3) | options)
        ),
        block_of=None,
    ),
)
