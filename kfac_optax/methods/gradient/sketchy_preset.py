"""Sketchy as a whole optimizer."""

from typing import Any

import optax

from kfac_optax._types import ScalarOrSchedule
from kfac_optax.methods.gradient.sketchy import scale_by_sketchy
from kfac_optax.methods.gradient.whole import OF_THE_STEP, entries, of_leaves, with_step
from kfac_optax.methods.record import Method
from kfac_optax.methods.signature import flat_signature


@flat_signature(scale_by_sketchy, schedules=OF_THE_STEP)
def sketchy(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ScalarOrSchedule | None = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Sketchy, a whole optimizer: `scale_by_sketchy`, decoupled weight decay, and the step.

    `theta <- theta - learning_rate (M + weight_decay theta)`, with `M` the trace of the
    preconditioned gradients. Memory is linear in the length of an axis, so that wide layers need
    not be cut.

    Args:
      learning_rate: number or schedule.
      momentum: of the preconditioned gradients; `None` for none.
      weight_decay: decoupled; `update` needs `params` where it is not the number zero.
      **options: as for `scale_by_sketchy`.

    Returns:
      A transformation whose updates are to be added to the parameters.

    Raises:
      TypeError: a leaf is complex or not floating; a size is no Python integer.
      ValueError: a hyperparameter out of range.

    >>> import jax.numpy as jnp
    >>> tx = sketchy(learning_rate=0.1, rank=1, ridge=0.0)
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.5]])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(updates.round(3) + 0)
    [[-0.1  0. ]
     [ 0.   0.1]]

    Reference: Feinberg, Chen, Sun, Anil & Hazan, Sketchy: Memory-efficient Adaptive Regularization
      with Frequent Directions (2023), algorithm 3.
    """
    preconditioner = scale_by_sketchy(momentum=momentum, **options)
    return with_step("sketchy", preconditioner, learning_rate, weight_decay)


def _numbers(sizes: Any) -> int:
    def of_axis(n: int) -> int:
        # U [n, k], D [k], rho
        k = min(sizes.r, n)
        return n * k + k + 1

    return of_leaves(lambda shape: sum(map(of_axis, shape)) + entries(shape))(sizes)


RECORDS = (
    Method(
        name="sketchy",
        kind="optimizer",
        summary="Shampoo with `rank=` directions of every statistic and a bound on the rest",
        paper="Feinberg, Chen, Sun, Anil & Hazan (2023)",
        equation="U = (U_L D_L U_Lᵀ + ρ_L I)^(-1/4) G (U_R D_R U_Rᵀ + ρ_R I)^(-1/4)",
        needs=frozenset({"gradient"}),
        state=_numbers,
        state_text="r (p + q) + 2 r + 2 + p q; r q + r + 1 + q of a bias",
        cost=("O(d³), at every statistic", "O(d² r)"),
        test="tests/methods/test_sketchy.py::test_upper_bound_is_what_preconditions",
        build=lambda layers, **options: sketchy(
            **(dict(learning_rate=0.1, rank=2, curvature_every=2) | options)
        ),
        block_of=None,
    ),
)
