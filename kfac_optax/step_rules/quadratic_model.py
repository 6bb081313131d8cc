"""The step from an exact quadratic model: learning rate and momentum that minimise it, over any
preconditioner.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import inner, wide_dtype
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import (
    NO_CURVATURE,
    check_axis_name,
    check_legal,
    check_subsample,
    legal_or_nan,
)
from kfac_optax.step_rules.directions import combine, inner_products_of, negative_parts
from kfac_optax.step_rules.model_solution import ModelSolution, solve_model
from kfac_optax.step_rules.model_solution import agreed_mix as agreed_mix


class QuadraticState(NamedTuple):
    """State of `quadratic_step`; all numbers are those of the last step, float32 or wider."""

    previous_update: PyTree  # like the parameters
    quadratic_count: Any  # shape=(), dtype=int32
    step_rate: jax.Array  # shape=()
    step_momentum: jax.Array  # shape=()
    coarse_rate: jax.Array  # shape=(): weight of the coarse part, 0 where the parts are not apart
    model_change: jax.Array  # shape=(): M(delta) - M(0) without the damping
    damped_change: jax.Array  # shape=(): the same with it, as minimised
    # shape=(), dtype=int32: steps left out because the model was not finite
    non_finite_models: jax.Array
    # shape=(), dtype=int32: steps left out because the model had no minimum
    negative_curvatures: jax.Array


def quadratic_step(
    *,
    learning_rate: ScalarOrSchedule | None = None,
    momentum: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1e-3,
    weight_decay: ScalarOrSchedule = 0.0,
    subsample: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes the step `delta = rate * (-U) + momentum * delta_0` that minimises an exact quadratic
    model of the objective.

    Where the transformation in front leaves the parts of `U` apart (`separate=True` of
    `scale_by_curvature`: the fine level and the coarse correction), each has a weight of its own,
    and the model then falls at least as far as for the fine part alone:
    `delta = -rate U_fine - coarse_rate U_coarse + momentum delta_0`, a `3 x 3` solve and one more
    product.

    `M(delta) = h + grad^T delta + delta^T (F + (damping + weight_decay) I) delta / 2`, with `U`
    what the preconditioner in front made of the gradient, `delta_0` the last step and `F` the exact
    Fisher or GGN on (part of) the batch: two Jacobian-vector products from one linearisation. `F`
    is never formed and no labels are needed. The result goes straight to `optax.apply_updates`:
    `optax.chain(kfac(layers, kl_clip=None), quadratic_step())` needs no learning rate.

    `update(updates, state, params, *, curvature, grad=None, value_fn=None, damping=None,
    model_damping=None)`:

    - `curvature`: `fisher.at(params, ...)`, in every step (pass `measure=False` where no statistics
      are due).
    - `grad`: gradient of the objective; where it is missing, slopes come from a forward-mode pass
      through `value_fn`.
    - `model_damping`, or else `damping`: replaces this transformation's own; `adapt_damping` passes
      both.

    A step whose model is not finite, or has no minimum, is left out and counted; so is one for which
    a schedule or a traced number is out of range.

    Args:
      learning_rate: fixes the rate; `None` solves for it.
      momentum: fixes the momentum, at most 1 (0: none); `None` solves for it.
      damping: Tikhonov damping of the model.
      weight_decay: coefficient `w` of a penalty `w/2 ||theta||^2` that the objective contains. The
        gradient has it already; here it is added to the curvature.
      subsample: part of the batch for the products, as in `fisher`; `None`: the part that the
        estimator measures.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A transformation; its state shows the last rate, momentum and predicted change.

    Raises:
      ValueError: a hyperparameter out of range; `curvature` missing, neither `grad` nor `value_fn`
        given.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x, target = jnp.zeros((2, 1)), jnp.eye(2), jnp.array([[1.0], [2.0]])
    >>> loss = lambda w: jnp.mean(jnp.sum((x @ w - target) ** 2, -1)) / 2
    >>> tx = quadratic_step(damping=0.0)
    >>> step, _ = tx.update(jax.grad(loss)(w), tx.init(w), w, curvature=estimator.at(w, x), value_fn=loss)
    >>> print(step.ravel())
    [1. 2.]

    Reference: Martens & Grosse (2015), sections 6.4 and 7.
    """
    where = "quadratic_step"
    # what is not given is solved for
    for name, number in (("learning_rate", learning_rate), ("momentum", momentum)):
        if number is not None:
            check_legal(where, name, number)
    check_legal(where, "damping", damping)
    check_legal(where, "weight_decay", weight_decay)
    check_subsample(where, "subsample", subsample)
    check_axis_name(where, axis_name)
    own_damping = damping

    def init(params: PyTree) -> QuadraticState:
        wide = wide_dtype(params)
        # the count, five numbers, two counters of failures
        dtypes = [jnp.int32] + [wide] * 5 + [jnp.int32] * 2
        numbers = [jnp.zeros((), dtype) for dtype in dtypes]
        no_step = jax.tree.map(jnp.zeros_like, params)
        return QuadraticState(no_step, *numbers)

    # NaN where a schedule or a traced number is out of range: the model is then not finite
    def given(name: str, number: Any, count: Any) -> Any:
        return None if number is None else legal_or_nan(name, number, count)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        curvature: Any = None,
        grad: PyTree | None = None,
        value_fn: Any = None,
        damping: Any = None,
        model_damping: Any = None,
        **extra: Any,
    ):
        del extra
        if not jax.tree.leaves(updates):
            return updates, state
        _check(where, curvature, grad, value_fn, params)
        count = state.quadratic_count
        # of `adapt_damping`: lambda for the model, gamma^2 for the preconditioner
        damping = damping if model_damping is None else model_damping
        damping = own_damping if damping is None else damping
        check_legal(f"{where}.update", "damping", damping)
        lam = legal_or_nan("damping", damping, count)
        with jax.named_scope("kfac/quadratic_model"):
            # -U part by part, and last delta_0
            directions = (*negative_parts(updates), state.previous_update)
            form = curvature.quadratic_form(directions, subsample=subsample, axis_name=axis_name)
            slope = _slopes(directions, params, grad, value_fn, axis_name)
            slope = slope.astype(form.dtype)
            squares = inner_products_of(directions).astype(form.dtype)
            # F + weight_decay I is the model; its damping is kept apart, for the reduction ratio
            decay = jnp.asarray(given("weight_decay", weight_decay, count), form.dtype)
            form = form + decay * squares
            damped = form + jnp.asarray(lam, form.dtype) * squares
            solution = solve_model(
                damped,
                slope,
                learning_rate=given("learning_rate", learning_rate, count),
                momentum=given("momentum", momentum, count),
            )
            step = combine(directions, solution.weights)
        return step, _next_state(state, step, solution, form, damped, slope)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(
    where: str,
    curvature: Any,
    grad: Any,
    value_fn: Any,
    params: Any,
) -> None:
    if curvature is None or not hasattr(curvature, "quadratic_form"):
        raise ValueError(
            NO_CURVATURE.format(where=where)
            + " The quadratic model needs it in every step: to take no statistics pass "
            "measure=False instead of curvature=None."
        )
    if grad is None and (value_fn is None or params is None):
        raise ValueError(
            f"{where}.update: got neither grad nor value_fn; the model needs the slope of the "
            "objective. Pass value_fn=lambda p: loss_fn(p, batch) (and params), or grad=grads "
            "where the gradient is at hand: tx.update(grads, state, params, curvature=..., "
            "grad=grads)."
        )


def _slopes(
    directions: Sequence[PyTree],
    params: PyTree,
    grad: PyTree,
    value_fn: Any,
    axis_name: Any,
) -> jax.Array:
    """Gradient of the objective along each direction."""
    if grad is not None:
        # the gradient second: XLA's CPU backend takes longer where a matrix product is first
        return jnp.stack([inner(direction, grad) for direction in directions])
    # of the objective on this batch: one forward pass, one product for each direction
    _, slope = jax.linearize(value_fn, params)
    slopes = jnp.stack([slope(direction) for direction in directions])
    return slopes if axis_name is None else jax.lax.pmean(slopes, axis_name)


def _next_state(state, step, solution: ModelSolution, form, damped, slope) -> QuadraticState:
    weights = solution.weights
    # M(delta) - M(0) = b^T w + w^T K w / 2
    coarse = jnp.zeros((), form.dtype)
    if len(weights) > 2:
        coarse = weights[1]
    usable = solution.finite & solution.convex

    def change(matrix: jax.Array) -> jax.Array:
        value = jnp.dot(slope, weights, precision="highest")
        product = jnp.dot(matrix, weights, precision="highest")
        value = value + jnp.dot(weights, product, precision="highest") / 2
        return jnp.where(usable, value, 0).astype(state.model_change.dtype)

    def kept(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(usable, new, old).astype(old.dtype)

    without_minimum = solution.finite & ~solution.convex
    return QuadraticState(
        jax.tree.map(kept, state.previous_update, step),
        optax.safe_increment(state.quadratic_count),
        solution.rate.astype(state.step_rate.dtype),
        solution.momentum.astype(state.step_momentum.dtype),
        coarse.astype(state.coarse_rate.dtype),
        change(form),
        change(damped),
        state.non_finite_models + (~solution.finite).astype(jnp.int32),
        state.negative_curvatures + without_minimum.astype(jnp.int32),
    )
