"""The step from an exact quadratic model: learning rate and momentum that minimise it, over any
preconditioner.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from kfac_optax._tree import inner, wide_dtype
from kfac_optax._types import Directions, PyTree, ScalarOrSchedule
from kfac_optax._validate import NO_CURVATURE, check_number, resolve


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


class ModelSolution(NamedTuple):
    """Weights of the directions, and whether the model has a minimum along the first."""

    rate: Float[Array, ""]  # of the first
    momentum: Float[Array, ""]  # of the last
    finite: jax.Array  # bool
    convex: jax.Array  # bool
    weights: Float[Array, " k"]  # of all


def solve_model(
    form: Float[Array, "k k"],
    slope: Float[Array, " k"],
    *,
    learning_rate: Any = None,
    momentum: Any = None,
) -> ModelSolution:
    """Minimises `slope^T w + w^T form w / 2` over all entries of `w`, or over those that are not
    given.

    A direction without curvature (no previous step) gets the weight zero, and so does one that
    depends on those before it to working precision. Where nothing is finite, or the first direction
    has no positive curvature although the model falls along it, all weights are zero.

    Args:
      form: `K`, curvature along the directions: what the preconditioner made, part by part, and
        last the previous step.
      slope: `b`, gradient along them.
      learning_rate: fixes the first weight.
      momentum: fixes the last.

    >>> solution = solve_model(jnp.array([[2.0, 0.0], [0.0, 4.0]]), jnp.array([-2.0, -2.0]))
    >>> print(solution.rate, solution.momentum)
    1.0 0.5

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), section 7, for two directions.
    """
    finite = jnp.all(jnp.isfinite(form)) & jnp.all(jnp.isfinite(slope))
    # d^T (F + damping I) d of the update; where it vanishes the slope has to vanish too
    first = form[0, 0]
    convex = (first > 0) | ((first == 0) & (slope[0] == 0))
    # the parts between the first and the last are always solved for
    given = [learning_rate, *[None] * (len(slope) - 2), momentum]
    weights = _minimise(form, slope, given)
    finite = finite & jnp.all(jnp.isfinite(weights))  # what is given may be anything
    weights = jnp.where(finite & convex, weights, 0)
    return ModelSolution(weights[0], weights[-1], finite, convex, weights)


def _minimise(form: jax.Array, slope: jax.Array, given: Sequence[Any]) -> jax.Array:
    """Weights of the minimum, by eliminating one direction after another; `None` in `given` is
    solved for.

    No factorisation of LAPACK's: a step has a few directions, and such calls must not run beside
    those of the inverses.
    """
    zero = jnp.zeros((), form.dtype)
    fixed = jnp.stack([zero if x is None else jnp.asarray(x, form.dtype) for x in given])
    free = [i for i, x in enumerate(given) if x is None]
    # K w = -b for the free weights, those that are fixed on the right-hand side
    slope = slope + jnp.sum(form * fixed, axis=1)
    limit = 64 * jnp.finfo(form.dtype).eps
    rows = {i: form[i] for i in free}
    right = {i: -slope[i] for i in free}
    usable: dict[int, jax.Array] = {}
    # forward elimination; a pivot that is rounding of its row depends on those before it
    for n, i in enumerate(free):
        pivot = rows[i][i]  # what is left of the curvature, a Schur complement
        usable[i] = pivot > limit * form[i, i]
        for j in free[n + 1 :]:
            factor = jnp.where(usable[i], rows[j][i] / jnp.where(usable[i], pivot, 1), 0)
            rows[j] = rows[j] - factor * rows[i]
            right[j] = right[j] - factor * right[i]
    weights = list(fixed)
    # back substitution
    for n, i in reversed(list(enumerate(free))):
        rest = right[i] - sum((rows[i][j] * weights[j] for j in free[n + 1 :]), zero)
        weights[i] = jnp.where(usable[i], rest / jnp.where(usable[i], rows[i][i], 1), 0)
    return jnp.stack(weights)


def agreed_mix(form: Float[Array, "k k"], slope: Float[Array, " k"]) -> Float[Array, " k"]:
    """Shares of the parts of an update, one for the first: the second enters as far as the model
    agrees with it.

    `(1, w)` with `w = min(1, max(0, w_2 / w_1))`, `w_1` and `w_2` the weights that minimise
    `slope^T w + w^T form w / 2`. Along `(1, w)` the model falls at least as far as along the first
    alone: `-(slope^T d)^2 / (2 d^T form d)` has its only minimum over `d = (1, w)` at `w_2 / w_1`.

    >>> print(agreed_mix(jnp.array([[2.0, 0.0], [0.0, 8.0]]), jnp.array([-2.0, -2.0])))
    [1.   0.25]
    """
    one = jnp.ones((1,), form.dtype)
    # the fine part alone
    if len(slope) == 1:
        return one
    fine, coarse = _minimise(form, slope, [None, None])
    usable = (fine > 0) & jnp.isfinite(fine) & jnp.isfinite(coarse)
    # w_2 / w_1 in [0, 1]; nothing of the coarse part where the fine one would go backwards
    share = jnp.where(usable, jnp.clip(coarse / jnp.where(usable, fine, 1), 0, 1), 0)
    return jnp.append(one, share)


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

    A step whose model is not finite, or has no minimum, is left out and counted.

    Args:
      learning_rate: fixes the rate; `None` solves for it.
      momentum: fixes the momentum (0: none); `None` solves for it.
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
            check_number(where, name, number, at_least=0)
    check_number(where, "damping", damping, at_least=0)
    check_number(where, "weight_decay", weight_decay, at_least=0)
    own_damping = damping

    def init(params: PyTree) -> QuadraticState:
        # the count, five numbers, two counters of failures
        dtypes = (jnp.int32, *(wide_dtype(params),) * 5, jnp.int32, jnp.int32)
        return QuadraticState(
            jax.tree.map(jnp.zeros_like, params), *(jnp.zeros((), dtype) for dtype in dtypes)
        )

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
        lam = resolve(own_damping if damping is None else damping, count)
        fixed = {"learning_rate": learning_rate, "momentum": momentum}
        with jax.named_scope("kfac/quadratic_model"):
            # -U part by part, and last delta_0
            directions = (*negative_parts(updates), state.previous_update)
            form = curvature.quadratic_form(directions, subsample=subsample, axis_name=axis_name)
            slope = _slopes(directions, params, grad, value_fn, axis_name).astype(form.dtype)
            squares = inner_products_of(directions).astype(form.dtype)
            # F + weight_decay I is the model; its damping is kept apart, for the reduction ratio
            form = form + jnp.asarray(resolve(weight_decay, count), form.dtype) * squares
            damped = form + jnp.asarray(lam, form.dtype) * squares
            solution = solve_model(
                damped,
                slope,
                **{k: None if x is None else resolve(x, count) for k, x in fixed.items()},
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
        return jnp.stack([inner(grad, direction) for direction in directions])
    # of the objective on this batch: one forward pass, one product for each direction
    _, slope = jax.linearize(value_fn, params)
    slopes = jnp.stack([slope(direction) for direction in directions])
    return slopes if axis_name is None else jax.lax.pmean(slopes, axis_name)


def negative_parts(updates: PyTree) -> tuple[PyTree, ...]:
    """The directions in which a preconditioner would go: one for the fine level, one for all that
    is added to it.
    """
    parts = updates.parts if isinstance(updates, Directions) else (updates,)
    # all that is added to the fine level counts as one direction
    if len(parts) > 2:
        parts = (parts[0], jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts[1:]))
    return tuple(jax.tree.map(jnp.negative, part) for part in parts)


def inner_products_of(directions: Sequence[PyTree]) -> jax.Array:
    """`<d_i, d_j>` of all pairs, `[k, k]`."""
    k = len(directions)
    # symmetric: the upper triangle only
    known = {(i, j): inner(directions[i], directions[j]) for i in range(k) for j in range(i, k)}
    rows = [jnp.stack([known[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)]
    return jnp.stack(rows)


def combine(directions: Sequence[PyTree], weights: jax.Array) -> PyTree:
    """`sum_i weights_i d_i`; where a weight is zero its direction may hold anything, NaN included."""

    def entry(*xs: jax.Array) -> jax.Array:
        dtype = xs[0].dtype
        terms = []
        for x, weight in zip(xs, weights, strict=True):
            w = weight.astype(dtype)
            terms.append(jnp.where(w == 0, 0, w * x.astype(dtype)))
        return sum(terms[1:], terms[0])

    return jax.tree.map(entry, *directions)


def _next_state(state, step, solution: ModelSolution, form, damped, slope) -> QuadraticState:
    weights = solution.weights
    # M(delta) - M(0) = b^T w + w^T K w / 2
    coarse = weights[1] if len(weights) > 2 else jnp.zeros((), form.dtype)
    usable = solution.finite & solution.convex

    def change(matrix: jax.Array) -> jax.Array:
        value = jnp.dot(slope, weights, precision="highest")
        value = (
            value
            + jnp.dot(weights, jnp.dot(matrix, weights, precision="highest"), precision="highest")
            / 2
        )
        return jnp.where(usable, value, 0).astype(state.model_change.dtype)

    return QuadraticState(
        jax.tree.map(
            lambda old, new: jnp.where(usable, new, old).astype(old.dtype),
            state.previous_update,
            step,
        ),
        optax.safe_increment(state.quadratic_count),
        solution.rate.astype(state.step_rate.dtype),
        solution.momentum.astype(state.step_momentum.dtype),
        coarse.astype(state.coarse_rate.dtype),
        change(form),
        change(damped),
        state.non_finite_models + (~solution.finite).astype(jnp.int32),
        state.negative_curvatures + (solution.finite & ~solution.convex).astype(jnp.int32),
    )
