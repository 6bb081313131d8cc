"""SPRING: natural gradient in sample space with projected momentum."""

from typing import Any

import optax

from kfac_optax._types import Layers, ScalarOrSchedule
from kfac_optax._validate import check_legal, check_number
from kfac_optax.methods.record import Method, Sizes
from kfac_optax.methods.sample_space.smw import COST
from kfac_optax.methods.sample_space.transformation import Rule, scale_by_samples
from kfac_optax.methods.signature import flat_signature


@flat_signature(schedules=("learning_rate",))
def spring(
    layers: Layers | None = None,
    *,
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 1e-3,
    momentum: ScalarOrSchedule = 0.99,
    norm_constraint: float | None = 1e-3,
    cutoff: float | None = None,
    sampled: bool = False,
    chunk: int = 8,
    refine: int = 1,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SPRING, a whole optimizer: the exact natural gradient with momentum that is projected anew in
    every step.

    `phi <- mu phi + (F + damping I)^{-1} (V - mu F phi)`: of the last direction what this batch
    sees is replaced, and `mu` times what it does not see is kept. In sample space, with
    `J = J / sqrt(N)` and a residual whose `J^T residual` is the gradient,
    `phi <- mu phi + J^T (J J^T + damping I)^{-1} (residual - mu J phi)`. Then
    `theta <- theta - learning_rate phi`, no longer than `sqrt(norm_constraint)`. With `momentum=0`
    it is `smw` with that bound.

    `update` takes what that of `smw` takes.

    Args:
      layers: as in `smw`.
      learning_rate: number or schedule.
      damping: Tikhonov damping of the kernel.
      momentum: `mu`.
      norm_constraint: bound on the squared norm of a step, rate included; `None` for none.
      cutoff: as in `smw`.
      sampled: as in `smw`.
      chunk: as in `smw`.
      refine: as in `smw`.
      axis_name: as in `smw`.

    Returns:
      A transformation whose updates are to be added to the parameters; its state is the last
      direction and a few numbers.

    Raises:
      ValueError: as `smw`.
      TypeError: as `smw`.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0]])
    >>> tx = spring(learning_rate=0.1, damping=1.0, momentum=0.5, norm_constraint=None)
    >>> state = tx.init(w)
    >>> for gradient in (jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [0.0]])):
    ...     updates, state = tx.update(gradient, state, w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [-0.05 -0.05]

    Reference: Goldshlager, Abrahamsen & Lin, A Kaczmarz-inspired approach to accelerate the
      optimization of neural network wavefunctions (2024).
    """
    # a whole optimizer: the bound is on its step, rate included
    check_legal("spring", "learning_rate", learning_rate)
    # phi <- mu phi + (F + damping I)^{-1} (V - mu F phi)
    rule = Rule("spring", layers, damping, momentum, cutoff, sampled, chunk, refine, axis_name)
    parts = [scale_by_samples(rule), optax.scale_by_learning_rate(learning_rate)]
    if norm_constraint is not None:
        check_number("spring", "norm_constraint", norm_constraint, above=0)
        # |step|^2 <= norm_constraint
        parts.append(optax.clip_by_global_norm(norm_constraint**0.5))
    return optax.chain(*parts)


def _last_direction(sizes: Sizes) -> int:
    # phi, like the parameters
    return sizes.p * sizes.q


_SHORT: dict[str, Any] = dict(learning_rate=0.1, damping=0.05)

RECORDS = (
    Method(
        name="spring",
        kind="optimizer",
        summary="the same with momentum that every batch projects anew, and a bound on the step",
        paper="Goldshlager, Abrahamsen & Lin (2024)",
        equation="φ ← μ φ + (F + λ I)⁻¹ (V - μ F φ)",
        needs=frozenset({"gradient", "curvature"}),
        state=_last_direction,
        state_text="p q",
        cost=("nothing", COST),
        test="tests/methods/test_sample_space.py::test_spring_is_its_recursion",
        build=lambda layers, **options: spring(layers, **(_SHORT | options)),
        block_of=None,
    ),
)
