"""Jorge as a whole optimizer."""

from typing import Any

import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax.methods.gradient.jorge import scale_by_jorge
from kfac_optax.methods.gradient.whole import OF_THE_STEP, entries, matrices, of_leaves, with_step
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature


@flat_signature(scale_by_jorge, schedules=OF_THE_STEP)
def jorge(
    learning_rate: ScalarOrSchedule,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Jorge, a whole optimizer: `scale_by_jorge`, decoupled weight decay, and the step. Rates are
    those of SGD with momentum.

    `theta <- theta - learning_rate (U + weight_decay theta)`, with `U` the direction of Jorge and
    the norms of SGD with momentum.

    Args:
      learning_rate: number or schedule.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      **options: as for `scale_by_jorge`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = jorge(learning_rate=0.1)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -3.0]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3) + 0)
    [[-0.3  0. ]
     [ 0.   0.3]]

    Reference: Singh, Bhatele et al., Jorge: Approximate Preconditioning for GPU-efficient
      Second-order Optimization (2023).
    """
    return with_step("jorge", scale_by_jorge(**options), learning_rate, weight_decay)


# a root for every axis, and the momenta of both directions
_numbers = of_leaves(lambda shape: matrices(shape) + 2 * entries(shape))

RECORDS = (
    Method(
        name="jorge",
        kind="optimizer",
        summary="Shampoo's roots followed by products alone, with the norms of SGD with momentum",
        paper="Singh et al. (2023)",
        equation="R ← b^(-1/4) Tᵀ R T, T = I - Y/8 + 9 Y²/128, Y = R⁴ G Gᵀ (1 - b)/b",
        needs=frozenset({"gradient"}),
        state=_numbers,
        state_text="p² + q² + 2 p q; q² + 2 q of a bias",
        cost=("O(d³), products alone", "O(d³)"),
        test="tests/methods/test_jorge.py::test_the_root_of_commuting_matrices_is_of_third_order",
        build=lambda layers, **options: jorge(
            **(dict(learning_rate=0.1, inverse_every=3) | options)
        ),
        block_of=None,
    ),
)
