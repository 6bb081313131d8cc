"""Presets that solve for the exact damped natural gradient of a batch."""

from typing import Any

import optax

from kfac_optax._types import Layers, ScalarOrSchedule
from kfac_optax._validate import check_legal, check_number
from kfac_optax.methods.record import Method, Sizes
from kfac_optax.methods.sample_space.transformation import Rule, scale_by_samples
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.kl_clip import clip_by_kl


@flat_signature()
def smw(
    layers: Layers | None = None,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1e-3,
    kl_clip: ScalarOrSchedule | None = None,
    cutoff: float | None = None,
    sampled: bool = False,
    chunk: int = 8,
    refine: int = 1,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The exact damped natural gradient of a batch, `U = (F + damping I)^{-1} V`, all layers
    together.

    With `F = (1/N) J^T J`, `J` of a row for every example and output column, the Sherman-Morrison-
    Woodbury formula needs the kernel `K = (1/N) J J^T` only, as large as the batch has rows:
    `U = (V - J^T (K + damping I)^{-1} J V / N) / damping`. Nothing is averaged over steps, and no
    matrix as large as the parameters exists. Chain it with the optimizer that takes the step,
    `optax.chain(smw(damping=1e-2), optax.sgd(lr))`, and pass
    `curvature=ggn(predict).at(params, *args)` to every update.

    `update(grads, state, params, *, curvature, residual=None, damping=None)`:

    - `curvature`: of any estimator with gradients. Of `ggn` and `fisher` rows are the columns of
      the output Fisher (Gauss-Newton), of `empirical_fisher` the examples' own gradients; of
      `fisher` with `sampled=True` scores at drawn labels (natural gradient), one row each.
    - `residual`: one number for every row, `[*batch, columns]` for each head or `[N]` of losses,
      where the gradient is `(1/N) J^T residual`. The step is then
      `J^T (K + damping I)^{-1} residual / N` (minSR), without the difference above; the values of
      `grads` are not read.
    - `damping`: replaces this transformation's own, as `adapt_damping` does.

    A step is left out, and counted in `skipped_steps`, where gradient, kernel or solution are not
    finite, or no example counts. `solve_error` is `|V - (F + damping I) U| / |V|`.

    Args:
      layers: from `ggn(predict).layers(params, *args)`: makes the kernel of the rows of layers,
        `K = sum_layers (a a^T) * (g g^T) / N`, much faster than by products with `J`, for models
        whose examples do not interact and whose parameters all belong to layers. `None`: by
        products with `J`, right for every model.
      learning_rate: KL-clip's rate, as in `kfac`.
      damping: Tikhonov damping, in the kernel as in the parameters.
      kl_clip: bound on the squared Fisher norm of a step; `None` hands on the solution as it is.
      cutoff: a smooth pseudo-inverse of the kernel in place of the Cholesky factor, without
        directions whose eigenvalue is below `cutoff` times the largest; works without damping, and
        leaves out what the gradient has outside of the rows of `J`.
      sampled: rows are scores at labels drawn from the model.
      chunk: columns of the kernel that are made at the same time; memory is that of so many
        gradients.
      refine: steps of iterative refinement, each a product in both directions.
      axis_name: mapped axis of `shard_map`/`pmap`, if any; the kernel is that of all devices.

    Returns:
      A transformation; its state has a few numbers only.

    Raises:
      ValueError: a hyperparameter out of range; in an update, no `curvature`, or a residual of
        another shape.
      TypeError: a complex parameter.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = smw(damping=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel())
    [1. 1.]

    Reference: Ren & Goldfarb, Efficient Subsampled Gauss-Newton and Natural Gradient Methods for
      Training Neural Networks (2019); Chen & Heyl, Empowering deep neural quantum states through
      efficient optimization (2024), for the step from residuals.
    """
    rule = Rule("smw", layers, damping, None, cutoff, sampled, chunk, refine, axis_name)
    if kl_clip is None:
        return scale_by_samples(rule)
    return clip_by_kl(scale_by_samples(rule), learning_rate=learning_rate, kl_clip=kl_clip)


@flat_signature()
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
    check_legal("spring", "learning_rate", learning_rate)
    rule = Rule("spring", layers, damping, momentum, cutoff, sampled, chunk, refine, axis_name)
    parts = [scale_by_samples(rule), optax.scale_by_learning_rate(learning_rate)]
    if norm_constraint is not None:
        check_number("spring", "norm_constraint", norm_constraint, above=0)
        parts.append(optax.clip_by_global_norm(norm_constraint**0.5))
    return optax.chain(*parts)


def _last_direction(sizes: Sizes) -> int:
    return sizes.p * sizes.q


_COST = "O(m² d + m³) for the m = N × outputs rows of a batch, from rows of layers"

RECORDS = (
    Method(
        name="smw",
        kind="preconditioner",
        summary="the exact damped natural gradient of a batch, all layers together, through the "
        "kernel of its rows; minSR from residuals",
        paper="Ren & Goldfarb (2019); Chen & Heyl (2024)",
        equation="U = (V - Jᵀ (J Jᵀ + N λ I)⁻¹ J V) / λ",
        needs=frozenset({"gradient", "curvature"}),
        state=lambda sizes: 0,
        state_text="0",
        cost=("nothing", _COST),
        test="tests/methods/test_sample_space.py::test_it_is_the_dense_damped_solve",
        build=lambda layers, **options: smw(layers, **({"damping": 0.05} | options)),
        block_of=None,
    ),
    Method(
        name="spring",
        kind="optimizer",
        summary="the same with momentum that every batch projects anew, and a bound on the step",
        paper="Goldshlager, Abrahamsen & Lin (2024)",
        equation="φ ← μ φ + (F + λ I)⁻¹ (V - μ F φ)",
        needs=frozenset({"gradient", "curvature"}),
        state=_last_direction,
        state_text="p q",
        cost=("nothing", _COST),
        test="tests/methods/test_sample_space.py::test_spring_is_its_recursion",
        build=lambda layers, **options: spring(
            layers, **({"learning_rate": 0.1, "damping": 0.05} | options)
        ),
        block_of=None,
    ),
)
