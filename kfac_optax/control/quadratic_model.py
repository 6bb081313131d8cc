"""The step from an exact quadratic model: learning rate and momentum that minimise it, over any preconditioner."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from kfac_optax._tree import inner, wide_dtype
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import NO_CURVATURE, check_number, resolve


class QuadraticState(NamedTuple):
    """State of `quadratic_step`; all numbers are those of the last step, float32 or wider."""

    previous_update: PyTree  # like the parameters
    quadratic_count: Any  # shape=(), dtype=int32
    step_rate: jax.Array  # shape=()
    step_momentum: jax.Array  # shape=()
    model_change: jax.Array  # shape=(): M(delta) - M(0) without the damping
    damped_change: jax.Array  # shape=(): the same with it, as minimised
    non_finite_models: jax.Array  # shape=(), dtype=int32: steps left out because the model was not finite
    negative_curvatures: jax.Array  # shape=(), dtype=int32: steps left out because the model had no minimum


class ModelSolution(NamedTuple):
    """Weights of the two directions, and whether the model has a minimum along the first."""

    rate: Float[Array, ""]
    momentum: Float[Array, ""]
    finite: jax.Array  # bool
    convex: jax.Array  # bool


def solve_model(
    form: Float[Array, "2 2"], slope: Float[Array, " 2"], *, learning_rate: Any = None, momentum: Any = None
) -> ModelSolution:
    """Minimises `slope^T w + w^T form w / 2` over both entries of `w`, or over those that are not given.

    A direction without curvature (no previous step) gets the weight zero, and so does the second where both are parallel
    to working precision. Where nothing is finite, or the first direction has no positive curvature although the model
    falls along it, both weights are zero.

    Args:
      form: `K`, curvature along the two directions.
      slope: `b`, gradient along them.
      learning_rate: fixes the first weight.
      momentum: fixes the second.

    >>> solution = solve_model(jnp.array([[2.0, 0.0], [0.0, 4.0]]), jnp.array([-2.0, -2.0]))
    >>> print(solution.rate, solution.momentum)
    1.0 0.5

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature (2015),
    section 7.
    """
    finite = jnp.all(jnp.isfinite(form)) & jnp.all(jnp.isfinite(slope))
    first, cross, second = form[0, 0], form[0, 1], form[1, 1]
    convex = (first > 0) | ((first == 0) & (slope[0] == 0))
    limit = 64 * jnp.finfo(form.dtype).eps
    safe_first = jnp.where(first > 0, first, 1)
    independent = (second > 0) & (jnp.square(cross) < (1 - limit) * first * second)
    safe_second = jnp.where(independent, second, 1)
    if learning_rate is None and momentum is None:
        cross, slope_second = jnp.where(independent, cross, 0), jnp.where(independent, slope[1], 0)
        rest = safe_second - cross * cross / safe_first  # Schur complement, positive
        weight = -(slope_second - cross * slope[0] / safe_first) / rest
        rate = -(slope[0] + cross * weight) / safe_first
    elif momentum is None:
        rate = jnp.asarray(learning_rate, form.dtype)
        usable = second > 0
        weight = jnp.where(usable, -(slope[1] + cross * rate) / jnp.where(usable, second, 1), 0)
    else:
        weight = jnp.asarray(momentum, form.dtype)
        rate = -(slope[0] + cross * weight) / safe_first if learning_rate is None else learning_rate
    finite = finite & jnp.isfinite(rate) & jnp.isfinite(weight)  # what is given may be anything
    usable = finite & convex
    rate, weight = (jnp.where(usable, jnp.asarray(x, form.dtype), 0) for x in (rate, weight))
    return ModelSolution(rate, weight, finite, convex)


def quadratic_step(
    *,
    learning_rate: ScalarOrSchedule | None = None,
    momentum: ScalarOrSchedule | None = None,
    damping: ScalarOrSchedule = 1e-3,
    weight_decay: ScalarOrSchedule = 0.0,
    subsample: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes the step `delta = rate * (-U) + momentum * delta_0` that minimises an exact quadratic model of the objective.

    `M(delta) = h + grad^T delta + delta^T (F + (damping + weight_decay) I) delta / 2`, with `U` what the preconditioner in
    front made of the gradient, `delta_0` the last step and `F` the exact Fisher or GGN on (part of) the batch: two
    Jacobian-vector products from one linearisation. `F` is never formed and no labels are needed. The result goes straight
    to `optax.apply_updates`: `optax.chain(kfac(layers, kl_clip=None), quadratic_step())` needs no learning rate.

    `update(updates, state, params, *, curvature, grad=None, value_fn=None, damping=None, model_damping=None)`:

    - `curvature`: `fisher.at(params, ...)`, in every step (pass `measure=False` where no statistics are due).
    - `grad`: gradient of the objective; where it is missing, slopes come from a forward-mode pass through `value_fn`.
    - `model_damping`, or else `damping`: replaces this transformation's own; `adapt_damping` passes both.

    A step whose model is not finite, or has no minimum, is left out and counted.

    Args:
      learning_rate: fixes the rate; `None` solves for it.
      momentum: fixes the momentum (0: none); `None` solves for it.
      damping: Tikhonov damping of the model.
      weight_decay: coefficient `w` of a penalty `w/2 ||theta||^2` that the objective contains. The gradient has it
        already; here it is added to the curvature.
      subsample: part of the batch for the products, as in `fisher`; `None`: the part that the estimator measures.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A transformation; its state shows the last rate, momentum and predicted change.

    Raises:
      ValueError: a hyperparameter out of range; `curvature` missing, neither `grad` nor `value_fn` given.

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
    for name, number in (("learning_rate", learning_rate), ("momentum", momentum)):
        if number is not None:
            check_number(where, name, number, at_least=0)
    check_number(where, "damping", damping, at_least=0)
    check_number(where, "weight_decay", weight_decay, at_least=0)
    own_damping = damping

    def init(params: PyTree) -> QuadraticState:
        dtypes = (jnp.int32, *(wide_dtype(params),) * 4, jnp.int32, jnp.int32)
        return QuadraticState(jax.tree.map(jnp.zeros_like, params), *(jnp.zeros((), dtype) for dtype in dtypes))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, *, curvature: Any = None, grad: PyTree | None = None,
        value_fn: Any = None, damping: Any = None, model_damping: Any = None, **extra: Any,
    ):  # fmt: skip
        del extra
        if not jax.tree.leaves(updates):
            return updates, state
        _check(where, curvature, grad, value_fn, params)
        count = state.quadratic_count
        damping = damping if model_damping is None else model_damping
        lam = resolve(own_damping if damping is None else damping, count)
        fixed = {"learning_rate": learning_rate, "momentum": momentum}
        with jax.named_scope("kfac/quadratic_model"):
            directions = (jax.tree.map(jnp.negative, updates), state.previous_update)
            form = curvature.quadratic_form(directions, subsample=subsample, axis_name=axis_name)
            slope = _slopes(directions, params, grad, value_fn, axis_name).astype(form.dtype)
            squares = _inner_products(directions).astype(form.dtype)
            form = form + jnp.asarray(resolve(weight_decay, count), form.dtype) * squares
            damped = form + jnp.asarray(lam, form.dtype) * squares
            solution = solve_model(
                damped, slope, **{k: None if x is None else resolve(x, count) for k, x in fixed.items()}
            )
            step = _combine(directions, solution.rate, solution.momentum)
        return step, _next_state(state, step, solution, form, damped, slope)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(where: str, curvature: Any, grad: Any, value_fn: Any, params: Any) -> None:
    if curvature is None or not hasattr(curvature, "quadratic_form"):
        raise ValueError(
            NO_CURVATURE.format(where=where)
            + " The quadratic model needs it in every step: to take no statistics pass measure=False instead of curvature=None."
        )
    if grad is None and (value_fn is None or params is None):
        raise ValueError(
            f"{where}.update: got neither grad nor value_fn; the model needs the slope of the objective. Pass "
            "value_fn=lambda p: loss_fn(p, batch) (and params), or grad=grads where the gradient is at hand: "
            "tx.update(grads, state, params, curvature=..., grad=grads)."
        )


def _slopes(directions: Sequence[PyTree], params: PyTree, grad: PyTree, value_fn: Any, axis_name: Any) -> jax.Array:
    """Gradient of the objective along each direction."""
    if grad is not None:
        return jnp.stack([inner(grad, direction) for direction in directions])
    _, slope = jax.linearize(value_fn, params)
    slopes = jnp.stack([slope(direction) for direction in directions])
    return slopes if axis_name is None else jax.lax.pmean(slopes, axis_name)


def _inner_products(directions: Sequence[PyTree]) -> jax.Array:
    first, second = directions
    cross = inner(first, second)
    return jnp.stack([jnp.stack([inner(first, first), cross]), jnp.stack([cross, inner(second, second)])])


def _combine(directions: Sequence[PyTree], rate: jax.Array, momentum: jax.Array) -> PyTree:
    # where a weight is zero its direction may hold anything, NaN included
    def entry(u: jax.Array, v: jax.Array) -> jax.Array:
        a, m = rate.astype(u.dtype), momentum.astype(u.dtype)
        return jnp.where(a == 0, 0, a * u) + jnp.where(m == 0, 0, m * v.astype(u.dtype))

    return jax.tree.map(entry, *directions)


def _next_state(state, step, solution: ModelSolution, form, damped, slope) -> QuadraticState:
    weights = jnp.stack([solution.rate, solution.momentum])
    usable = solution.finite & solution.convex

    def change(matrix: jax.Array) -> jax.Array:
        value = jnp.dot(slope, weights, precision="highest")
        value = value + jnp.dot(weights, jnp.dot(matrix, weights, precision="highest"), precision="highest") / 2
        return jnp.where(usable, value, 0).astype(state.model_change.dtype)

    return QuadraticState(
        jax.tree.map(lambda old, new: jnp.where(usable, new, old).astype(old.dtype), state.previous_update, step),
        optax.safe_increment(state.quadratic_count),
        solution.rate.astype(state.step_rate.dtype),
        solution.momentum.astype(state.step_momentum.dtype),
        change(form),
        change(damped),
        state.non_finite_models + (~solution.finite).astype(jnp.int32),
        state.negative_curvatures + (solution.finite & ~solution.convex).astype(jnp.int32),
    )
