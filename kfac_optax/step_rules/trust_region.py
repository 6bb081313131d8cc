"""Trust region: bounds the predicted KL divergence of a step in a metric of choice, over any
preconditioner.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import covered_leaves
from kfac_optax._types import Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import (
    Checked,
    check_axis_name,
    check_choice,
    check_legal,
    check_subsample,
    checked,
    start_checked,
)
from kfac_optax.step_rules._per_layer import (
    exact_square,
    inner_products,
    inverse_root_of,
    require_curvature,
    scale_layers,
)

METRICS = ("damped", "exact")
Metric = Callable[[PyTree, PyTree], jax.Array]  # (state of the preconditioner, updates) -> U^T F U


class TrustRegionState(NamedTuple):
    """State of `clip_by_trust_region`: that of the preconditioner, the step count, and the last
    factor `nu`.
    """

    preconditioner: PyTree
    trust_count: Any  # shape=(), dtype=int32
    trust_scale: jax.Array  # shape=(), dtype=float32
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def clip_by_trust_region(
    preconditioner: optax.GradientTransformation,
    *,
    learning_rate: ScalarOrSchedule,
    radius: ScalarOrSchedule = 1e-3,
    metric: str | Metric = "damped",
    layers: Layers | None = None,
    subsample: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the output of a preconditioner so that the predicted KL divergence of a step stays
    below `radius`.

    `nu = min(1, sqrt(2 radius / (learning_rate^2 U^T F U)))`, so the length of the step along `U`
    is `learning_rate nu = min(learning_rate, sqrt(2 radius / U^T F U))` and, where the bound is
    active, `learning_rate^2 nu^2 U^T F U / 2 = radius`. With gradients multiplied by a number `U`
    grows by as much and `nu` shrinks: the step taken stays the same. `nu = 1` where the product is
    not a positive finite number, a vanishing update for one.

    What `U^T F U` is, the metric decides:

    - `"damped"`: `sum_i <U_i, V_i>` with `V_i` the raw gradients. For `U = (F + damping I)^{-1} V`
      that is `U^T (F + damping I) U`, at no cost. `radius = kl_clip / 2` gives `clip_by_kl`, except
      that signs count here.
    - `"exact"`: the Fisher of the batch itself, from `curvature.quadratic_form`: a forward pass and
      a forward-mode one more, and the extra argument `curvature` in every step (the preconditioner
      then follows its own period, `refresh=None`).
    - a function `(state of the preconditioner, updates) -> scalar`, such as
      `factor_metric(layers)`.

    Args:
      preconditioner: any transformation; extra arguments are handed on.
      learning_rate: the rate that the following transformations apply; only used in the formula.
      radius: the bound on half the squared Fisher norm of a step.
      metric: `"damped"`, `"exact"` or a function.
      layers: only these layers are measured (in the first two metrics) and scaled, with what was
        given their size (`uncovered="graft"` of the table); default: the whole update.
      subsample: part of the batch for `"exact"`, as in `fisher`.
      axis_name: mapped axis over which the batch is split, for `"exact"`.

    Returns:
      A transformation; its state shows the last `nu` as `trust_scale`.

    Raises:
      ValueError: a number out of range, an unknown metric; in an update, no `curvature` for the
        exact metric.

    >>> tx = clip_by_trust_region(optax.identity(), learning_rate=1.0, radius=0.5)
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> print(updates, state.trust_scale)
    [0.6 0.8] 0.2

    Reference: Wu, Mansimov, Liao, Grosse & Ba, Scalable trust-region method for deep reinforcement
      learning using Kronecker-factored approximation (2017), section 3.2.
    """
    where = "clip_by_trust_region"
    check_legal(where, "learning_rate", learning_rate)
    check_legal(where, "radius", radius)
    check_subsample(where, "subsample", subsample)
    check_axis_name(where, axis_name)
    if not callable(metric):
        check_choice(where, "metric", metric, METRICS)
    preconditioner = optax.with_extra_args_support(preconditioner)

    def init(params: PyTree) -> TrustRegionState:
        given = start_checked(learning_rate=learning_rate, radius=radius)
        count, scale = jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32)
        return TrustRegionState(preconditioner.init(params), count, scale, given)

    def product(
        state: PyTree, updates: PyTree, gradients: PyTree, extra: dict[str, Any]
    ) -> tuple[Any, jax.Array]:
        """The product and a power of two that multiplies it."""
        # U^T F U by the user, by the raw gradients, or exact
        if callable(metric):
            return metric(state, updates), jnp.zeros((), jnp.int32)
        if metric == "damped":
            products = inner_products(updates, gradients, layers)
            return jnp.sum(products.values), products.exponent
        # one product with the exact curvature of the batch
        curvature = require_curvature(where, 'metric="exact"', extra.get("curvature"))
        mine = covered_leaves(updates, layers)
        return exact_square(curvature, mine, subsample=subsample, axis_name=axis_name)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any):
        preconditioned, inner = preconditioner.update(
            updates, state.preconditioner, params, **extra
        )
        # values that make no sense leave the last good ones
        rate, given = checked(state.given, "learning_rate", learning_rate, state.trust_count)
        bound, given = checked(given, "radius", radius, state.trust_count)
        with jax.named_scope("kfac/trust_region"):
            form, exponent = product(inner, preconditioned, updates, extra)
            scale = trust_scale(form, rate, bound, exponent=exponent)
            clipped = scale_layers(preconditioned, scale, layers)
        count = optax.safe_increment(state.trust_count)
        return clipped, TrustRegionState(inner, count, scale.astype(jnp.float32), given)

    return optax.GradientTransformationExtraArgs(init, update)


def trust_scale(
    product: Any,
    learning_rate: Any,
    radius: Any,
    *,
    exponent: Any = 0,
) -> jax.Array:
    """The factor `nu = min(1, sqrt(2 radius / (learning_rate^2 product 2^exponent)))`.

    >>> print(trust_scale(25.0, 1.0, 0.5))
    0.2
    """
    # no narrower than float32, so that the root has digits
    product = jnp.asarray(product)
    product = product.astype(jnp.result_type(jnp.float32, product))
    bound = 2 * jnp.asarray(radius, product.dtype)
    return inverse_root_of(product, jnp.asarray(exponent, jnp.int32), learning_rate, bound)
