"""Subsampled Gauss-Newton and natural gradient, and minSR."""

from typing import Any

import optax

from kfac_optax._types import Layers, ScalarOrSchedule
from kfac_optax.methods.record import Method
from kfac_optax.methods.sample_space.transformation import Rule, scale_by_samples
from kfac_optax.methods.signature import flat_signature
from kfac_optax.step_rules.kl_clip import clip_by_kl

COST = "O(m² d + m³) for the m = N × outputs rows of a batch, from rows of layers"


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
        `K = sum_layers (a a^T) * (g g^T) / N`, with a backward pass for each output column instead
        of two products for each row of `J`. For models whose examples do not interact (other ones
        show in `solve_error`) and whose parameters all belong to layers. `None`: by products with
        `J`, right for every model.
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
    # no momentum: every step stands alone
    rule = Rule("smw", layers, damping, None, cutoff, sampled, chunk, refine, axis_name)
    if kl_clip is None:
        return scale_by_samples(rule)
    # nu = min(1, sqrt(kl_clip / (learning_rate^2 sum_i |<U_i, V_i>|))), i the leaves
    return clip_by_kl(scale_by_samples(rule), learning_rate=learning_rate, kl_clip=kl_clip)


_SHORT: dict[str, Any] = dict(damping=0.05)

RECORDS = (
    Method(
        name="smw",
        kind="preconditioner",
        summary="the exact damped natural gradient of a batch, all layers together, through the "
        "kernel of its rows; minSR from residuals",
        paper="Ren & Goldfarb (2019); Chen & Heyl (2024)",
        equation="U = (V - Jᵀ (J Jᵀ + N λ I)⁻¹ J V) / λ",
        needs=frozenset({"gradient", "curvature"}),
        # nothing is kept between steps
        state=lambda sizes: 0,
        state_text="0",
        cost=("nothing", COST),
        test="tests/methods/test_sample_space.py::test_it_is_the_dense_damped_solve",
        build=lambda layers, **options: smw(layers, **(_SHORT | options)),
        # a solve over all layers together
        block_of=None,
    ),
)
