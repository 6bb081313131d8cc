"""Bounds the step that is really taken, momentum included, in the exact metric; its length then
needs no rate.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import inner, named_leaves, wide_dtype
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import (
    Checked,
    check_axis_name,
    check_legal,
    check_momentum,
    check_number,
    checked,
    start_checked,
)
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.step_rules._per_layer import like_parameters
from kfac_optax.step_rules.directions import (
    combine,
    inner_products_of,
    kept_finite,
    moved_since,
    negative_parts,
)
from kfac_optax.step_rules.model_solution import agreed_mix, solve_model

MODEL_EXAMPLES = 256


class BoundState(NamedTuple):
    """State of `bound_step`; numbers are float32, or wider where the parameters are."""

    preconditioner: PyTree
    previous_params: PyTree  # like the parameters: those of the last update
    bound_count: Any  # shape=(), dtype=int32
    step_rate: jax.Array  # shape=(): weight of the fine part in the last step
    coarse_rate: jax.Array  # shape=(): of the coarse part, 0 where the parts are not apart
    bound_scale: jax.Array  # shape=(): what the bound left of the last step
    known_slope: jax.Array  # shape=(): slope along the last step that an exact product decided
    peak_rate: jax.Array  # shape=(): the largest learning rate so far
    last_rate: jax.Array  # shape=(): the learning rate of the last update
    given: dict[str, Checked]


class _Step(NamedTuple):
    """What decides a step: weights of the parts, what is left of it, and the slope along it."""

    rates: jax.Array
    scale: jax.Array
    slope: jax.Array


def bound_step(
    preconditioner: optax.GradientTransformation,
    *,
    learning_rate: ScalarOrSchedule,
    kl_clip: ScalarOrSchedule = 1e-3,
    momentum: float = 0.9,
    damping: ScalarOrSchedule = 1e-3,
    examples: int = MODEL_EXAMPLES,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes the whole step, momentum included, as long as an exact quadratic model wants it, within
    an exact bound.

    With `T0` the step before (how the parameters have moved, whatever moved them) and `m` the
    momentum of what follows, the next step is `T = s (m T0 - rate U - coarse_rate U_c)`. Rates
    minimise the model

        `M(T) = grad^T T + T^T (F + damping I) T / 2`

    with `F` the exact Fisher or GGN of the batch, from one linearisation. Where the preconditioner
    leaves the fine part `U` and the coarse part `U_c` apart (`separate=True`), the latter enters as
    far as the model agrees, `0 <= coarse_rate <= rate`, and `M` falls no less than for `U` alone.
    Then `s = min(1, sqrt(kl_clip / ((1 - m)^2 T^T F T)))`: a preconditioned gradient that stays the
    same builds up steps of `1 / (1 - m)` times its own length, so `kl_clip` is the bound of a
    single one, as in `clip_by_kl`, but in the metric of the Fisher itself, over the whole update.
    Where `U` misjudges the curvature, `|<U, grad>|` bounds nothing.

    What is handed on is `(m T0 - T) / learning_rate`, of which
    `optax.sgd(learning_rate, momentum=m)` makes the step `T`. So the level of the rate has no
    influence (it may be anything but zero); where a schedule lowers it, steps shrink in proportion
    to the largest rate so far. Without momentum behind it, steps are shorter than the model wants.

    In an update with `curvature=None` rates and scale of the last exact product are used again,
    less where the slope along the step has grown since; before the first one, the rule of
    `clip_by_kl`.

    Args:
      preconditioner: any transformation; extra arguments are handed on.
      learning_rate: the rate that the following transformations apply.
      kl_clip: bound on the squared Fisher norm of a step, momentum apart.
      momentum: of the transformation that follows, in [0, 1).
      damping: Tikhonov damping of the model.
      examples: how many examples of a batch the products are taken on, or all where there are
        fewer.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A transformation; `update` needs `params`. Its state shows the last rates and `bound_scale`,
      the last `s`.

    Raises:
      TypeError: a schedule where a number is meant.
      ValueError: a hyperparameter out of range; in an update, `params` missing.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = bound_step(optax.identity(), learning_rate=0.1, kl_clip=1.0, momentum=0.0, damping=0.0)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print((-0.1 * updates).ravel(), state.step_rate, state.bound_scale)  # the model's minimum is at -2, -2
    [-1. -1.] 2.0 0.5

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), section 7, for steps from an exact model; Ba, Grosse & Martens (2017) for
      the bound.
    """
    where = "bound_step"
    check_legal(where, "learning_rate", learning_rate)
    check_legal(where, "kl_clip", kl_clip)
    check_legal(where, "damping", damping)
    check_momentum(where, momentum)
    check_number(where, "examples", examples, at_least=1)
    check_axis_name(where, axis_name)
    own_damping = damping
    preconditioner = optax.with_extra_args_support(preconditioner)

    def init(params: PyTree) -> BoundState:
        dtype = wide_dtype(params)

        def number(value: float) -> jax.Array:
            return jnp.full((), value, dtype)  # a new array each time: no buffer occurs twice

        # hyperparameters are checked when they are used: schedules and injected values too
        given = start_checked(learning_rate=learning_rate, kl_clip=kl_clip, damping=damping)
        return BoundState(
            preconditioner.init(params),
            jax.tree.map(jnp.zeros_like, params),  # not read before the first update
            jnp.zeros((), jnp.int32),
            number(0),
            number(0),
            number(1),
            number(0),
            number(0),
            number(0),
            given,
        )

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any):
        # handed on as they came: the preconditioner tells a forgotten curvature from none
        curvature, damping = extra.get("curvature"), extra.get("damping")
        preconditioned, after = preconditioner.update(
            updates, state.preconditioner, params, **extra
        )
        if not jax.tree.leaves(updates):
            return preconditioned, state._replace(preconditioner=after)
        if params is None:
            raise ValueError(
                f"{where}.update: got no params; the bound is one on how the parameters really "
                "move. Pass them: tx.update(grads, opt_state, params, curvature=...)."
            )
        # numbers of this step, in place of those that make no sense
        dtype = state.step_rate.dtype
        rate, given = checked(state.given, "learning_rate", learning_rate, state.bound_count)
        bound, given = checked(given, "kl_clip", kl_clip, state.bound_count)
        lam, given = checked(
            given, "damping", own_damping if damping is None else damping, state.bound_count
        )
        rate, bound, lam = (jnp.asarray(x, dtype) for x in (rate, bound, lam))
        # a schedule that lowers the rate shortens the step that the model wants
        peak = jnp.maximum(state.peak_rate, rate)
        share = rate / positive_or_one(peak)  # what a schedule has left of the rate
        carried = momentum * rate / positive_or_one(state.last_rate)
        with jax.named_scope("kfac/bound_step"):
            parts = negative_parts(preconditioned)
            last = moved_since(state.previous_params, params, first=state.bound_count == 0)
            # of a step in constant directions
            room = bound / (1 - momentum) ** 2
            if curvature is None:
                step = _as_before(parts, updates, state, rate, bound)
            else:
                directions = (*parts, last)
                form = _form(curvature, directions, examples, axis_name).astype(dtype)
                step = _decide(directions, form, updates, lam, carried, share, room)
            # what sgd makes of it: rate * new = carried * last - step
            of_last = (1 - step.scale) * carried
            weights = jnp.append(-step.scale * step.rates, of_last)
            new = combine((*parts, last), weights / positive_or_one(rate))
        # of a step that the model could not decide nothing is remembered
        decided = jnp.isfinite(step.slope) & (step.slope != 0)
        before = jnp.stack([state.step_rate, state.coarse_rate])
        missing = 2 - len(step.rates)
        both = jnp.pad(step.rates.astype(dtype), (0, missing))
        rates = jnp.where(decided, both, before)
        new_state = BoundState(
            after,
            kept_finite(params, state.previous_params),
            optax.safe_increment(state.bound_count),
            rates[0],
            rates[1],
            step.scale.astype(dtype),
            jnp.where(decided, step.slope.astype(dtype), state.known_slope),
            peak,
            rate,
            given,
        )
        return new, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _form(
    curvature: Any,
    directions: Sequence[PyTree],
    examples: int,
    axis_name: Any,
) -> jax.Array:
    """`d_i^T F d_j` on some examples; parameters that are masked have no part in a direction."""
    whole = [like_parameters(curvature.params, named_leaves(direction)) for direction in directions]
    return curvature.quadratic_form(whole, subsample=examples, axis_name=axis_name)


def _decide(
    directions: Sequence[PyTree],
    form: jax.Array,
    grads: PyTree,
    damping: jax.Array,
    momentum: jax.Array,
    share: jax.Array,
    room: jax.Array,
) -> _Step:
    """Rates that minimise the model behind the momentum, and what the bound leaves of the step."""
    # b_i = grad^T d_i and K_ij = d_i^T (F + damping I) d_j, the last direction being T0
    slopes = jnp.stack([inner(grads, d) for d in directions]).astype(form.dtype)
    squares = inner_products_of(directions).astype(form.dtype)
    damped = form + damping * squares
    # shares of the parts, with the momentum term as part of the slope
    of_parts = slopes[:-1] + momentum * damped[:-1, -1]
    mix = agreed_mix(damped[:-1, :-1], of_parts)
    # columns: the mixed update and the last step, so that one rate is left to find
    joined = jnp.zeros((len(directions), 2), form.dtype)
    joined = joined.at[:-1, 0].set(mix)
    joined = joined.at[-1, 1].set(1)
    model = sandwich(joined.T, damped, joined)
    slopes_of_both = jnp.sum(joined * slopes[:, None], axis=0)
    rate = solve_model(model, slopes_of_both, momentum=momentum).rate
    # the step may not turn back; without a model momentum goes on
    rates = jnp.where(rate > 0, share * rate, 0) * mix
    whole = jnp.append(rates, momentum)
    # T^T F T without the damping, of the whole step
    product = jnp.sum(form * whole, axis=1)
    square = jnp.sum(whole * product)
    usable = jnp.isfinite(square) & (square > 0)
    longest = jnp.sqrt(room / jnp.where(usable, square, 1))
    scale = jnp.minimum(1, share * longest)
    slope = jnp.sum(rates * slopes[:-1])
    return _Step(rates, jnp.where(usable, scale, 1), slope)


def _as_before(
    parts: Sequence[PyTree],
    grads: PyTree,
    state: BoundState,
    learning_rate: jax.Array,
    kl_clip: jax.Array,
) -> _Step:
    """Rates of the last exact product, less where the slope has grown; those of KL-clip where there
    was none.
    """
    # sizes of the slope along the step, now and when a product decided
    slopes = jnp.stack([inner(grads, d) for d in parts])
    slopes = slopes.astype(state.step_rate.dtype)
    rates = jnp.stack([state.step_rate, state.coarse_rate])
    rates = rates[: len(parts)]
    slope = jnp.abs(jnp.sum(rates * slopes))
    known = jnp.abs(state.known_slope)
    # a longer slope in the same metric is a longer step: shortened by its root
    grown = (slope > known) & (slope > 0)
    shorter = jnp.sqrt(known / jnp.where(grown, slope, 1))
    again = rates * jnp.where(grown, shorter, 1)
    # without any product yet: nu = sqrt(kl_clip / (rate^2 |<U, V>|))
    square = jnp.square(learning_rate) * jnp.abs(jnp.sum(slopes))
    usable = jnp.isfinite(square) & (square > 0)
    longest = jnp.sqrt(kl_clip / jnp.where(usable, square, 1))
    clip = jnp.where(usable, jnp.minimum(1, longest), square == 0)
    fresh = jnp.full(rates.shape, learning_rate * clip)
    has_model = state.known_slope != 0
    rates = jnp.where(has_model, again, fresh)
    return _Step(rates, state.bound_scale, state.known_slope)
