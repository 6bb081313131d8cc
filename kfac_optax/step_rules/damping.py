"""Levenberg-Marquardt damping: trusts the quadratic model as far as it predicted the objective,
over any optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import wide_dtype
from kfac_optax._types import Numeric, PyTree
from kfac_optax._validate import NO_CURVATURE
from kfac_optax.step_rules.damping_search import search
from kfac_optax.step_rules.reduction_ratio import (
    DampingRule,
    check_rule,
    failures,
    least_damping,
    lowest_ratio,
    mean_over,
    model_change_of,
    promise,
    quadratic_state,
)
from kfac_optax.step_rules.rejection import if_due, reject


class DampingState(NamedTuple):
    """State of `adapt_damping`; numbers are float32, or wider where the parameters are."""

    optimizer: PyTree
    damping_count: Any  # shape=(), dtype=int32: steps
    model_damping: jax.Array  # shape=(): lambda
    preconditioner_damping: jax.Array  # shape=(): gamma^2
    reduction_ratio: jax.Array  # shape=(): the last one, 1 before the first
    rejected_steps: jax.Array  # shape=(), dtype=int32
    rejected_in_a_row: jax.Array  # shape=(), dtype=int32: up to the last step
    damping_at_bound: jax.Array  # shape=(), dtype=int32: adaptations that ended on a bound


def adapt_damping(
    optimizer: optax.GradientTransformation,
    *,
    initial_damping: Numeric = 1.0,
    every: int = 5,
    decay: Numeric = 0.95,
    lower: Numeric = 0.25,
    upper: Numeric = 0.75,
    damping_min: Numeric | None = 1e-8,
    damping_max: Numeric = 1e8,
    reject_below: Numeric | None = 0.0,
    include_damping: bool = False,
    weight_decay: Numeric = 0.0,
    search_every: int | None = None,
    search_decay: Numeric | None = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adapts the damping `lambda` of everything inside `optimizer` to how well the quadratic model
    predicts the objective.

    Every `every` steps the reduction ratio
    `rho = (h(theta + delta) - h(theta)) / (M(delta) - M(0))` is measured on the batch of the step.
    With `omega = decay^every`: `rho > upper` gives `lambda <- omega lambda`, `rho < lower` or a
    ratio that is not finite `lambda <- lambda / omega`. The optimizer gets `lambda` as
    `model_damping` and `gamma^2 = lambda + weight_decay` as `damping`; both levels of two-level
    K-FAC use the latter.

    The ratio is also measured, whatever the period, of a step that the model has little reason for:
    one whose predicted decrease exceeds `|value|`, or whose curvature is next to all damping
    (saturated outputs), or whose prediction is not finite. The first of these is rejected below
    `lower` already: it promised more than there is to gain. An ordinary step costs no evaluation of
    the objective for it. So is each of the first `every` steps, when the initial damping is a guess
    and one long step can lose the whole start; it may raise the damping, but not lower it before
    its turn.

    A step whose ratio is measured and lies below `reject_below` (the objective rose), or is not
    finite, is rejected: the update is zero and everything the optimizer holds stays as it was,
    momentum included, apart from the curvature itself. The `n`-th rejection in a row raises the damping by
    `omega^-n`, so that a start far from the right damping is not waited out. A step that the model
    could not decide raises the damping at once.

    With `search_every`, every so many steps `gamma^2` itself is chosen among its last value, and
    that times and divided by `search_decay`: all three updates are made, and the one with the
    smallest `M(delta)` is taken.

    `update(grads, state, params, *, curvature, value, value_fn, grad=None, adapt=None)`:

    - `value`, `value_fn`: the objective at the parameters, and as a function of them, on this
      batch.
    - `grad`: of the objective, where the incoming updates are not that.
    - `adapt=None`: the schedule is traced. A Python bool decides now whether the ratio is measured.

    Args:
      optimizer: preconditioner and step, for example `optax.chain(kfac(...), quadratic_step())`. An
        optimizer without `quadratic_step` works too: its model change is then computed where it is
        needed.
      initial_damping: `lambda` at the start.
      every: period of the adaptation, in steps.
      decay: factor per step, in (0, 1].
      lower: ratio below which the damping grows.
      upper: ratio above which it shrinks.
      damping_min: lower bound of `lambda`; `None`: `0.01 min(1, 128 / cases)`, where `cases` counts
        the predictions of a batch that have a loss of their own.
      damping_max: upper bound of `lambda`.
      reject_below: ratios below it reject the step; `None` rejects only what is not finite.
      include_damping: whether `M` in the ratio contains `lambda ||delta||^2 / 2`.
      weight_decay: coefficient `w` of a penalty `w/2 ||theta||^2` that the objective contains.
      search_every: period of the search for `gamma`; `None`: no search. Needs `quadratic_step`.
      search_decay: factor on `gamma^2` of its candidates, default `decay^search_every`.
      axis_name: mapped axis over which the batch is split; values are averaged over it.

    Returns:
      A transformation; its state shows `lambda`, the last ratio and how often steps were rejected.

    Raises:
      TypeError: a schedule where a number is meant.
      ValueError: a hyperparameter out of range; `curvature`, `value` or `value_fn` missing.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x, target = jnp.zeros((2, 1)), jnp.eye(2), jnp.array([[1.0], [2.0]])
    >>> loss = lambda w: jnp.mean(jnp.sum((x @ w - target) ** 2, -1)) / 2
    >>> tx = adapt_damping(ko.quadratic_step(), initial_damping=1.0, every=1)
    >>> value, grad = jax.value_and_grad(loss)(w)
    >>> step, state = tx.update(grad, tx.init(w), w, curvature=estimator.at(w, x), value=value, value_fn=loss)
    >>> print(state.reduction_ratio.round(3), state.model_damping)
    1.0 0.95

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), sections 6.5 and 6.6.
    """
    settings = DampingRule(
        "adapt_damping",
        every,
        decay,
        lower,
        upper,
        damping_min,
        damping_max,
        reject_below,
        include_damping,
        weight_decay,
        search_every,
        search_decay,
        axis_name,
    )
    check_rule(settings, initial_damping)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> DampingState:
        dtype = wide_dtype(params)
        # gamma^2 = lambda + weight_decay
        start = jnp.array(initial_damping, dtype)
        return DampingState(
            optimizer.init(params),
            jnp.zeros((), jnp.int32),
            start,
            start + jnp.asarray(weight_decay, dtype),
            jnp.ones((), dtype),
            *[jnp.zeros((), jnp.int32)] * 3,
        )

    def update(
        updates: PyTree,
        state: Any,
        params: Any = None,
        *,
        curvature: Any = None,
        value: Any = None,
        value_fn: Any = None,
        grad: PyTree | None = None,
        adapt: bool | None = None,
        **extra: Any,
    ):
        if not jax.tree.leaves(updates):
            return updates, state
        _check_arguments(settings.where, params, curvature, value, value_fn)
        rule = settings._replace(damping_min=least_damping(settings, curvature))
        grad = updates if grad is None else grad

        # the inner update as a function of gamma^2, of which a search tries three
        def attempt(gamma: jax.Array) -> tuple[PyTree, PyTree]:
            return optimizer.update(
                updates,
                state.optimizer,
                params,
                curvature=curvature,
                value=value,
                value_fn=value_fn,
                grad=grad,
                damping=gamma,
                model_damping=state.model_damping,
                **extra,
            )

        step, after, gamma = search(rule, state, attempt, adapt)
        # what `quadratic_step` inside knows of its own model, if it is there
        known = quadratic_state(after)
        failed = failures(known) > failures(quadratic_state(state.optimizer))

        # h(theta + delta) and M(delta) - M(0): a forward pass, and a product without
        # `quadratic_step`
        def measure() -> tuple[jax.Array, jax.Array]:
            change = model_change_of(rule, known, step, curvature, grad, state.model_damping)
            return mean_over(value_fn(optax.apply_updates(params, step)), axis_name), change

        scheduled = state.damping_count % every == every - 1 if adapt is None else bool(adapt)
        promised = promise(rule, known, step, grad, mean_over(value, axis_name))
        # out of turn only upwards, but where the model is doubtful
        first = state.damping_count < every
        may_shrink = jnp.asarray(scheduled) | promised.too_much | promised.flat
        # all devices have to measure together
        due = scheduled is True or may_shrink | first
        # rho = (h(theta + delta) - h(theta)) / (M(delta) - M(0))
        new_value, change = if_due(due, measure)
        ratio = (new_value - mean_over(value, axis_name)) / change
        lowest = lowest_ratio(rule, promised)
        step, after, rejected = reject(
            step, after, state.optimizer, (ratio, failed, due, lowest), new_value
        )
        outcome = _Outcome(ratio, jnp.asarray(due), may_shrink, failed, rejected)
        return step, _next_state(rule, state, after, gamma, outcome)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_arguments(
    where: str,
    params: Any,
    curvature: Any,
    value: Any,
    value_fn: Any,
) -> None:
    # all that the ratio is made of
    missing = {"params": params, "value": value, "value_fn": value_fn}
    missing = [name for name, x in missing.items() if x is None]
    if missing:
        raise ValueError(
            f"{where}.update: got no {', '.join(missing)}; the reduction ratio compares the "
            "objective before and after the step on the same batch. Pass tx.update(grads, state, "
            "params, curvature=fisher.at(params, x, key=key), value=loss, value_fn=lambda p: "
            "loss_fn(p, batch))."
        )
    if curvature is None:
        raise ValueError(
            NO_CURVATURE.format(where=where)
            + " Adaptive damping needs it in every step: to take no statistics pass measure=False instead of curvature=None."
        )


class _Outcome(NamedTuple):
    """What came of a step; all of shape ()."""

    ratio: jax.Array  # of reduction, NaN where it was not measured
    due: jax.Array  # bool: it was measured
    may_shrink: jax.Array  # bool: and may lower the damping
    failed: jax.Array  # bool: the model had no minimum
    rejected: jax.Array  # bool: the step was taken back


def _next_state(
    rule: DampingRule,
    state: Any,
    after: PyTree,
    gamma: jax.Array,
    outcome: _Outcome,
) -> DampingState:
    lam = state.model_damping
    ratio = outcome.ratio.astype(lam.dtype)
    decides = outcome.due & ~outcome.failed
    grow = outcome.failed | (outcome.due & ~(ratio >= rule.lower))  # NaN grows
    shrink = decides & outcome.may_shrink & (ratio > rule.upper)
    # omega = decay^every: lambda omega where rho is high, lambda / omega where it is low, and
    # lambda / omega^n at the n-th rejection in a row
    omega = jnp.asarray(rule.decay, lam.dtype) ** rule.every
    row = jnp.where(outcome.rejected, state.rejected_in_a_row + 1, 0)
    wanted = jnp.where(shrink, lam * omega, lam)
    wanted = jnp.where(grow, lam / omega ** jnp.maximum(row, 1), wanted)
    damping = jnp.clip(wanted, rule.damping_min, rule.damping_max)
    at_bound = (wanted != damping) & (grow | shrink)
    # where no search chooses it, gamma^2 follows lambda
    if rule.search_every is None:
        gamma = damping + jnp.asarray(rule.weight_decay, lam.dtype)
    measured = decides & jnp.isfinite(ratio)
    return DampingState(
        after,
        optax.safe_increment(state.damping_count),
        damping,
        gamma,
        jnp.where(measured, ratio, state.reduction_ratio),
        state.rejected_steps + outcome.rejected.astype(jnp.int32),
        row,
        state.damping_at_bound + at_bound.astype(jnp.int32),
    )
