"""Weight decay around a preconditioner: of the objective, decoupled from it, or measured by the
Fisher.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import named_leaves
from kfac_optax._types import PyTree, ScalarOrSchedule
from kfac_optax._validate import (
    Checked,
    check_axis_name,
    check_choice,
    check_legal,
    check_subsample,
    checked,
    start_checked,
)
from kfac_optax.step_rules._per_layer import like_parameters, require_curvature

MODES = ("loss", "decoupled", "fisher")
Mask = PyTree | Callable[[PyTree], PyTree]


class WeightDecayState(NamedTuple):
    """State of `add_weight_decay`: that of the preconditioner and the step count."""

    preconditioner: PyTree
    decay_count: Any  # shape=(), dtype=int32
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def add_weight_decay(
    preconditioner: optax.GradientTransformation,
    weight_decay: ScalarOrSchedule,
    *,
    mode: str = "loss",
    mask: Mask | None = None,
    subsample: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds weight decay in, behind or in the metric of a preconditioner `P ~ (F + damping I)^{-1}`.

    With `V` the gradient, `theta` the parameters and `w` the weight decay the update is

    - `"loss"`: `P (V + w theta)`. The objective is the loss plus `(w/2) ||theta||^2`, and whatever
      runs inside sees it whole: the extra arguments `grad`, `value` and `value_fn` are augmented
      too. The curvature `w I` of the penalty is not added anywhere: add `w` to the damping where it
      matters.
    - `"decoupled"`: `P V + w theta`. A penalty in the metric of the preconditioner,
      `(w/2) theta^T P^{-1} theta` with `P` held fixed, has gradient `w P^{-1} theta`, which `P`
      turns into `w theta`: with `P^{-1} = F + damping I` this is a Fisher norm plus a part of the
      usual penalty. What controls the step inside does not see it.
    - `"fisher"`: `P (V + w F theta)`, the gradient of the Fisher norm `(w/2) theta^T F theta`
      alone, `F` held fixed, with the exact `F theta` of the batch from `curvature.vector_product`.
      With the exact `P` it is `P V + w theta - w damping P theta`: decoupled decay where the
      curvature is far above the damping, none in directions that the outputs do not depend on. The
      extra argument `grad` is augmented too; `value` is not.

    Step control belongs inside, `add_weight_decay(clip_by_kl(...), w)`: there it gets the gradient
    that the preconditioner gets. Multiples of the identity as preconditioner make the first two the
    same, up to the size of `w`. For a network without biases whose activations are homogeneous
    (ReLU) `theta^T F theta = L^2 E[f^T H f]`, with `L` layers, outputs `f` and output Hessian `H`:
    the Fisher norm then penalises outputs, however the weights are scaled.

    Args:
      preconditioner: any transformation; extra arguments are handed on. The learning rate belongs
        behind all of this.
      weight_decay: `w`.
      mode: `"loss"`, `"decoupled"` or `"fisher"`; the last needs the extra argument `curvature` in
        every step.
      mask: tree of booleans like the parameters (or a prefix of it), or a function of the
        parameters that returns one: only parameters where it is true are part of the penalty.
      subsample: part of the batch for `F theta`, as in `fisher`.
      axis_name: mapped axis over which the batch is split, for `F theta`.

    Returns:
      A transformation; `update` needs `params`.

    Raises:
      ValueError: unknown mode, negative decay; in an update, no `params`, or no `curvature` for
        `"fisher"`.

    >>> params, grads = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])
    >>> for mode in ("loss", "decoupled"):
    ...     tx = add_weight_decay(optax.scale(10.0), 0.1, mode=mode)
    ...     print(tx.update(grads, tx.init(params), params)[0])
    [11.  2.]
    [10.1  0.2]

    Reference: Zhang, Wang, Xu & Grosse, Three Mechanisms of Weight Decay Regularization (2019),
      section 3 and lemma 2.
    """
    where = "add_weight_decay"
    check_legal(where, "weight_decay", weight_decay)
    check_choice(where, "mode", mode, MODES)
    check_subsample(where, "subsample", subsample)
    check_axis_name(where, axis_name)
    preconditioner = optax.with_extra_args_support(preconditioner)

    def init(params: PyTree) -> WeightDecayState:
        given = start_checked(weight_decay=weight_decay)
        count = jnp.zeros((), jnp.int32)
        return WeightDecayState(preconditioner.init(params), count, given)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ):
        if params is None:
            raise ValueError(
                f"{where}.update got no `params`; expected tx.update(grads, opt_state, params, "
                "...)."
            )
        # a value that makes no sense leaves the last good one
        weight, given = checked(state.given, "weight_decay", weight_decay, state.decay_count)
        decayed = _masked(params, mask)
        # F theta, exact on the batch, in place of theta
        if mode == "fisher":
            curvature = require_curvature(where, 'mode="fisher"', extra.get("curvature"))
            vector = like_parameters(curvature.params, named_leaves(decayed))
            product = curvature.vector_product(vector, subsample=subsample, axis_name=axis_name)
            product = named_leaves(product)
            mine = {name: product[name] for name in named_leaves(params)}
            decayed = _masked(like_parameters(params, mine), mask)
        # a part of the objective: whatever runs inside sees it in the gradient
        if mode != "decoupled":
            updates = _plus(updates, weight, decayed)
            penalty = functools.partial(_penalty, weight=weight, mask=mask)
            extra = _augmented(extra, weight, decayed, penalty, whole=mode == "loss")
        new, inner = preconditioner.update(updates, state.preconditioner, params, **extra)
        # behind the preconditioner: P V + w theta
        if mode == "decoupled":
            new = _plus(new, weight, decayed)
        return new, WeightDecayState(inner, optax.safe_increment(state.decay_count), given)

    return optax.GradientTransformationExtraArgs(init, update)


def _masked(params: PyTree, mask: Mask | None) -> PyTree:
    """The parameters, zero where the mask is false."""
    if mask is None:
        return params
    # a mask may stop above the leaves, as a prefix of the tree
    kept = mask(params) if callable(mask) else mask
    zero = functools.partial(jax.tree.map, jnp.zeros_like)

    def choose(keep: bool, part: PyTree) -> PyTree:
        return part if keep else zero(part)

    return jax.tree.map(choose, kept, params)


def _plus(updates: PyTree, weight: Any, tree: PyTree) -> PyTree:
    def add(g: jax.Array, p: jax.Array) -> jax.Array:
        return g + jnp.asarray(weight, g.dtype) * p.astype(g.dtype)

    return jax.tree.map(add, updates, tree)


def _penalty(
    params: PyTree,
    weight: Any,
    mask: Mask | None,
) -> jax.Array:
    square = optax.tree.norm(_masked(params, mask), squared=True)
    return 0.5 * weight * square


def _augmented(
    extra: dict[str, Any],
    weight: Any,
    decayed: PyTree,
    penalty: Callable,
    *,
    whole: bool,
) -> dict[str, Any]:
    """Extra arguments about the loss, turned into those about the whole objective."""
    # gradient, value and function of the loss become those of the objective
    extra = dict(extra)
    if extra.get("grad") is not None:
        extra["grad"] = _plus(extra["grad"], weight, decayed)
    if not whole:
        return extra
    if extra.get("value") is not None:
        value = jnp.asarray(extra["value"])
        extra["value"] = value + penalty(decayed).astype(value.dtype)
    if extra.get("value_fn") is not None:
        value_fn = extra["value_fn"]

        @functools.wraps(value_fn)  # Optax looks the names of further arguments up in the signature
        def objective(params: PyTree, *args: Any, **kwargs: Any) -> Any:
            return value_fn(params, *args, **kwargs) + penalty(params)

        extra["value_fn"] = objective
    return extra
