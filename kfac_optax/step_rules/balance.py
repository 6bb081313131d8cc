"""How much of a coarse correction enters: as much as an exact quadratic model agrees with, over any
rate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import inner, named_leaves, wide_dtype
from kfac_optax._types import Directions, PyTree, ScalarOrSchedule
from kfac_optax._validate import (
    Checked,
    check_axis_name,
    check_legal,
    check_number,
    checked,
    start_checked,
)
from kfac_optax.step_rules._per_layer import like_parameters
from kfac_optax.step_rules.bound import MODEL_EXAMPLES
from kfac_optax.step_rules.directions import combine, inner_products_of, negative_parts
from kfac_optax.step_rules.model_solution import agreed_mix


class BalanceState(NamedTuple):
    """State of `balance_parts`; the share is float32, or wider where the parameters are."""

    preconditioner: PyTree
    balance_count: Any  # shape=(), dtype=int32
    coarse_weight: jax.Array  # shape=(): of the coarse part, in [0, 1]
    given: dict[str, Checked]


def balance_parts(
    preconditioner: optax.GradientTransformation,
    *,
    damping: ScalarOrSchedule = 1e-3,
    examples: int = MODEL_EXAMPLES,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a coarse correction to the fine part only as far as the exact quadratic model agrees
    with it.

    `U = U_fine + w U_coarse`, `w = min(1, max(0, w_coarse / w_fine))` with `w_fine` and `w_coarse`
    the weights that minimise `M(-w_fine U_fine - w_coarse U_coarse)`,
    `M(d) = grad^T d + d^T (F + damping I) d / 2`, on the batch of the step. So what follows may use
    any rate: the direction is that of the paper where its coarse model is right, and the fine part
    alone where it is not. An update with `curvature=None` keeps the last weight, one at first.

    Args:
      preconditioner: leaves its parts apart, `scale_by_curvature(..., separate=True)`; any other
        passes unchanged.
      damping: Tikhonov damping of the model.
      examples: how many examples of a batch the products are taken on, or all where there are
        fewer.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A transformation; its state shows the last `coarse_weight`.

    Raises:
      ValueError: a hyperparameter out of range.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> pair = ko.scale_by_curvature(
    ...     estimator.layers(w, x), block=ko.kronecker(), coupling=ko.coarse_correction(), damping=0.5, separate=True
    ... )
    >>> tx = balance_parts(pair, damping=0.5)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel(), state.coarse_weight)  # one layer: the fine level has solved it
    [1. 1.] 0.0
    """
    check_legal("balance_parts", "damping", damping)
    check_number("balance_parts", "examples", examples, at_least=1)
    check_axis_name("balance_parts", axis_name)
    own_damping = damping
    preconditioner = optax.with_extra_args_support(preconditioner)

    def init(params: PyTree) -> BalanceState:
        given = start_checked(damping=damping)
        start = jnp.ones((), wide_dtype(params))
        count = jnp.zeros((), jnp.int32)
        return BalanceState(preconditioner.init(params), count, start, given)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ):
        # handed on as they came: the preconditioner tells a forgotten curvature from none
        curvature, damping = extra.get("curvature"), extra.get("damping")
        new, after = preconditioner.update(updates, state.preconditioner, params, **extra)
        # a damping that makes no sense leaves the last good one
        lam, given = checked(
            state.given, "damping", own_damping if damping is None else damping, state.balance_count
        )
        weight = state.coarse_weight
        if isinstance(new, Directions):
            directions = negative_parts(new)
            if curvature is not None and len(directions) == 2:
                with jax.named_scope("kfac/balance"):
                    weight = _agreed(
                        directions, updates, curvature, lam, examples, axis_name
                    ).astype(weight.dtype)
            # -(U_fine + w U_coarse), from the negative parts
            ones = jnp.ones((), weight.dtype)
            weights = jnp.stack([ones, weight])[: len(directions)]
            new = combine(directions, -weights)
        return new, BalanceState(after, optax.safe_increment(state.balance_count), weight, given)

    return optax.GradientTransformationExtraArgs(init, update)


def _agreed(
    directions,
    grads: PyTree,
    curvature: Any,
    damping: Any,
    examples: int,
    axis_name: Any,
) -> jax.Array:
    """Weight of the second direction relative to the first where the model is smallest, within [0,
    1].
    """
    # K_ij = d_i^T (F + damping I) d_j and b_i = grad^T d_i
    whole = [like_parameters(curvature.params, named_leaves(direction)) for direction in directions]
    form = curvature.quadratic_form(whole, subsample=examples, axis_name=axis_name)
    squares = inner_products_of(directions).astype(form.dtype)
    form = form + jnp.asarray(damping, form.dtype) * squares
    slopes = jnp.stack([inner(grads, d) for d in directions])
    _, weight = agreed_mix(form, slopes.astype(form.dtype))
    return weight
