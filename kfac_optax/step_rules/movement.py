"""Bounds how far the parameters move in a step, momentum included, in the exact metric; the rate
stays what it is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import inner, named_leaves, replace_leaves, trains, wide_dtype
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import (
    Checked,
    NoProductsError,
    check_axis_name,
    check_legal,
    check_momentum,
    check_number,
    checked,
    start_checked,
)
from kfac_optax.linalg.division import positive_or_one, quotient_or_zero
from kfac_optax.linalg.powers import times_power
from kfac_optax.step_rules._per_layer import inverse_root_of, like_parameters
from kfac_optax.step_rules._small import join_small
from kfac_optax.step_rules.directions import exponent_of_sum, kept_finite, moved_since, scaled_sum


class MovementState(NamedTuple):
    """State of `bound_movement`; numbers are float32, or wider where the parameters are."""

    preconditioner: PyTree
    previous_params: PyTree  # like the parameters: those of the last update
    movement_count: Any  # shape=(), dtype=int32
    movement_scale: jax.Array  # shape=(): what the bound left of the last movement
    movement_norm: jax.Array  # shape=(): (1 - m) sqrt(T^T F T) of it before the bound
    last_rate: jax.Array  # shape=(): the learning rate of the last update
    planned_size: jax.Array  # shape=(): length of the last movement, if sgd made it
    plain_size: jax.Array  # shape=(): and if sgd without momentum did
    other_movements: Any  # shape=(), dtype=int32: how many were not those of sgd
    given: dict[str, Checked]


def bound_movement(
    preconditioner: optax.GradientTransformation,
    *,
    learning_rate: ScalarOrSchedule,
    kl_clip: ScalarOrSchedule = 1e-3,
    momentum: float = 0.9,
    examples: int | None = None,
    required: bool = True,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Shortens the whole movement of the parameters, momentum included, to an exact bound.

    `T = s (m T0 - learning_rate U)`, `s = min(1, sqrt(kl_clip / ((1 - m)^2 T'^T F T')))` with `T'`
    what the parentheses hold, `T0` the step before (how the parameters have moved, whatever moved
    them), `m` the momentum of what follows, and `F` the exact Fisher or GGN of the batch, one
    forward-mode product. `1 - m` is there since updates that stay the same build up steps of
    `1 / (1 - m)` times their own length: `kl_clip` is the bound of a single one, as in `clip_by_kl`.
    The next step starts from the movement that was made: momentum does not carry on what the bound
    has cut off.

    Unlike `bound_step` it looks for no rate. Over `clip_by_kl`, whose `|<U, grad>|` is the Fisher
    norm only where `U` does not misjudge the curvature, it is what holds where that fails.

    What is handed on is `(m T0 - T) / learning_rate`, of which
    `optax.sgd(learning_rate, momentum=m)` makes the step `T`. An update with `curvature=None`, or a
    product that is zero or not finite, keeps the last `s`, one at first. A step at rate zero ends
    the momentum: what it would gather there no movement shows.

    How far the parameters moved tells whether such an `sgd` follows. After a movement that is not
    about as long as planned, or nearer to that of an `sgd` without momentum, `m` is zero in the next
    step: its own part is bounded alone, and nothing is taken back. `problems` counts them where the
    bound was active.

    Args:
      preconditioner: any transformation; extra arguments are handed on.
      learning_rate: the rate that the following transformations apply.
      kl_clip: bound on the squared Fisher norm of a step, momentum apart.
      momentum: of the transformation that follows, in [0, 1).
      examples: how many examples of a batch the product is taken on, or all where there are fewer;
        by default few: so many that there are 8 predictions (of a text each position is one) with
        32,768 numbers, at least 2, at most 256.
      required: whether a curvature that has no products (a likelihood without an exact Fisher) is an
        error, or the step stays as long as it is.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A transformation; `update` needs `params`. Its state shows the last `s` as `movement_scale`
      and `(1 - m) sqrt(T'^T F T')` as `movement_norm`.

    Raises:
      TypeError: a schedule where a number is meant.
      ValueError: a hyperparameter out of range; in an update, `params` missing.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jnp.zeros((2, 1)), jnp.eye(2)
    >>> tx = bound_movement(optax.identity(), learning_rate=4.0, kl_clip=1.0, momentum=0.0)
    >>> updates, state = tx.update(jnp.ones((2, 1)), tx.init(w), w, curvature=estimator.at(w, x))
    >>> print(updates.ravel(), state.movement_scale, state.movement_norm)
    [0.25 0.25] 0.25 4.0

    Reference: Ba, Grosse & Martens, Distributed second-order optimization using Kronecker-factored
      approximations (2017), for the bound on an update, here exact and of the whole movement.
    """
    where = "bound_movement"
    check_legal(where, "learning_rate", learning_rate)
    check_legal(where, "kl_clip", kl_clip)
    check_momentum(where, momentum)
    if examples is not None:
        check_number(where, "examples", examples, at_least=1)
    check_axis_name(where, axis_name)
    preconditioner = optax.with_extra_args_support(preconditioner)

    def init(params: PyTree) -> MovementState:
        dtype = jnp.finfo(wide_dtype(params)).dtype  # real, of complex parameters too
        # not read before the first update; new arrays each time: no buffer occurs twice
        unread = jax.tree.map(jnp.zeros_like, params)
        one = jnp.ones((), dtype)
        norm, rate, planned, plain = (jnp.zeros((), dtype) for _ in range(4))
        count, other = (jnp.zeros((), jnp.int32) for _ in range(2))
        given = start_checked(learning_rate=learning_rate, kl_clip=kl_clip)
        inner_state = preconditioner.init(params)
        return MovementState(
            inner_state, unread, count, one, norm, rate, planned, plain, other, given
        )

    def squared(curvature: Any, direction: Mapping[str, jax.Array]) -> jax.Array | None:
        """`d^T F d` of a direction by name, if there are products."""
        part = "few" if examples is None else examples
        if not required and not hasattr(curvature, "quadratic_form"):
            return None
        whole = like_parameters(curvature.params, direction)
        try:
            form = curvature.quadratic_form((whole,), subsample=part, axis_name=axis_name)
        except NoProductsError:
            if required:
                raise
            return None
        return form[0, 0]

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any):
        # handed on as they came: the preconditioner tells a forgotten curvature from none
        curvature = extra.get("curvature")
        new, after = preconditioner.update(updates, state.preconditioner, params, **extra)
        if not jax.tree.leaves(updates):
            return new, state._replace(preconditioner=after)
        if params is None:
            raise ValueError(
                f"{where}.update: got no params; the bound is one on how the parameters really "
                "move. Pass them: tx.update(grads, opt_state, params, curvature=...)."
            )
        # numbers of this step, in place of those that make no sense
        dtype, count = state.movement_scale.dtype, state.movement_count
        rate, given = checked(state.given, "learning_rate", learning_rate, count)
        bound, given = checked(given, "kl_clip", kl_clip, count)
        rate, bound = jnp.asarray(rate, dtype), jnp.asarray(bound, dtype)
        with jax.named_scope("kfac/bound_movement"):
            last = moved_since(state.previous_params, params, first=count == 0)
            moving, before = _moving(new), _moving(last)
            # sums go over few leaves, the small ones joined
            few, few_before = join_small(moving, before)
            # sgd with this momentum would have moved so far
            moved = _product(few_before, few_before).astype(dtype)
            other = ~_follows(jnp.sqrt(moved), state.planned_size, state.plain_size)
            carried = jnp.where(other, 0, jnp.asarray(momentum, dtype))
            # T0 / last_rate is what sgd carries on; nothing after a step at rate zero
            per_rate = quotient_or_zero(carried, state.last_rate)
            scale, norm = state.movement_scale, state.movement_norm
            # T' = c T0 - rate U as 2^exponent D: no product with D overflows
            of_last = rate * per_rate
            weights = jnp.stack([-rate, of_last])
            exponent = exponent_of_sum((few, few_before), weights)
            direction = scaled_sum(moving, before, weights, exponent)
            product = None if curvature is None else squared(curvature, direction)
            if product is not None:
                square = product.astype(dtype)
                found = inverse_root_of(square, 2 * exponent, 1 - carried, bound).astype(dtype)
                root = jnp.sqrt(jnp.maximum(square, 0))
                length = (1 - carried) * times_power(root, exponent)
                # of a batch that says nothing, nothing is remembered
                scale = jnp.where(jnp.isfinite(square) & (square > 0), found, scale)
                norm = jnp.where(jnp.isfinite(length), length, norm)
            # s 2^exponent: what is left of D; at rate zero sgd forgets T0
            left = times_power(jnp.where(rate > 0, scale, 0), exponent)
            # what sgd makes of it: rate * handed = c T0 - s T'; divided last, since compilers repeat
            # what is cheaper in every loop that reads it
            divisor = positive_or_one(rate)
            shares = jnp.stack([-left, divisor * per_rate]) / divisor
            handed = replace_leaves(new, _sum(direction, before, shares))
            # sgd with this momentum moves by b T0 - rate * handed = s T' + (b - c) T0, whatever has
            # been left out here, and sgd without one by s T' - c T0
            behind = momentum * quotient_or_zero(rate, state.last_rate)
            beside = jnp.stack([behind, jnp.zeros_like(behind)]) - of_last
            whole = scaled_sum(few, few_before, weights, exponent)
            short = jnp.square(left) * _product(whole, whole).astype(dtype)
            both = left * _product(whole, few_before).astype(dtype)
            squares = short + 2 * beside * both + jnp.square(beside) * moved
            sizes = jnp.sqrt(jnp.maximum(squares, 0))
        return handed, MovementState(
            preconditioner=after,
            previous_params=kept_finite(params, state.previous_params),
            movement_count=optax.safe_increment(count),
            movement_scale=scale,
            movement_norm=norm,
            last_rate=rate,
            planned_size=sizes[0],
            plain_size=sizes[1],
            # without a bound momentum is only counted, not taken back
            other_movements=state.other_movements + (other & (state.movement_scale < 1)),
            given=given,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _moving(tree: PyTree) -> dict[str, jax.Array]:
    """The leaves that train, by name; what is masked is none of them."""
    return {name: x for name, x in named_leaves(tree).items() if trains(x)}


def _sum(
    first: Mapping[str, jax.Array],
    second: Mapping[str, jax.Array],
    weights: jax.Array,
) -> dict[str, jax.Array]:
    """`weights_0 a + weights_1 b` of finite leaves by name, in the dtype of the first."""
    a, b = weights
    out = {}
    for name, x in first.items():
        out[name] = a.astype(x.dtype) * x + b.astype(x.dtype) * second[name].astype(x.dtype)
    return out


def _product(left: Mapping[str, jax.Array], right: Mapping[str, jax.Array]) -> jax.Array:
    """Inner product of movements; of complex numbers the real part, as lengths have it."""
    conjugate = {name: jnp.conj(x) for name, x in right.items()}
    return jnp.real(inner(left, conjugate))


def _follows(moved: jax.Array, planned: jax.Array, plain: jax.Array) -> jax.Array:
    """Whether sgd with its momentum made a movement: one about as long as planned, and no nearer to
    what it would be without momentum. A plan of zero has nothing to say, nor has one whose square
    overflows.
    """
    about = (moved < 1.5 * planned) & (moved > planned / 1.5)
    nearer = jnp.abs(moved - planned) <= jnp.abs(moved - plain) + 1e-3 * planned
    return (about & nearer) | ~(planned > 0)
