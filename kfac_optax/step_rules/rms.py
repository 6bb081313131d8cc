"""Clips the root mean square of every layer's update, over any preconditioner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import Layers, PyTree, ScalarOrSchedule
from kfac_optax._validate import Checked, check_legal, checked, start_checked
from kfac_optax.step_rules._per_layer import map_layers, norms


class RMSClipState(NamedTuple):
    """State of `clip_by_rms`: that of the preconditioner, the step count, and the smallest factor
    of the last step.
    """

    preconditioner: PyTree
    rms_count: Any  # shape=(), dtype=int32
    rms_scale: jax.Array  # shape=(), dtype=float32
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def clip_by_rms(
    preconditioner: optax.GradientTransformation,
    *,
    max_rms: ScalarOrSchedule = 1.0,
    layers: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the output of a preconditioner layer by layer so that no layer's entries exceed
    `max_rms` on average.

    `U_i <- U_i min(1, max_rms / rms(U_i))`, `rms(U) = sqrt(mean(U^2))` over all entries of a layer,
    kernel and bias together. Every matrix of a stacked or grouped layer is clipped on its own. A
    layer whose rms is not finite stays as it is.

    Args:
      preconditioner: any transformation; extra arguments are handed on.
      max_rms: the bound.
      layers: kernel and bias of each make a layer, and so does every other leaf on its own;
        default: every leaf is a layer, which is
        `optax.chain(preconditioner, optax.clip_by_block_rms(max_rms))`.

    Returns:
      A transformation; its state shows the smallest factor of the last step as `rms_scale`.

    Raises:
      ValueError: `max_rms` not positive.

    >>> tx = clip_by_rms(optax.identity(), max_rms=1.0)
    >>> grads = {"small": jnp.full(2, 0.5), "large": jnp.full(2, 4.0)}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["small"], updates["large"], state.rms_scale)
    [0.5 0.5] [1. 1.] 0.25

    Reference: Puiu, Randomized K-FACs: Speeding up K-FAC with Randomized Numerical Linear Algebra
      (2022): the rule of its experiments.
    """
    check_legal("clip_by_rms", "max_rms", max_rms)
    preconditioner = optax.with_extra_args_support(preconditioner)

    def init(params: PyTree) -> RMSClipState:
        count, scale = jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32)
        given = start_checked(max_rms=max_rms)
        return RMSClipState(preconditioner.init(params), count, scale, given)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ):
        preconditioned, inner = preconditioner.update(
            updates, state.preconditioner, params, **extra
        )
        bound, given = checked(state.given, "max_rms", max_rms, state.rms_count)

        def clip(u: jax.Array) -> tuple[jax.Array, jax.Array]:
            # min(1, max_rms / rms) for every matrix; what is not finite stays, to be seen
            rms = norms(u, mean=True)
            usable = jnp.isfinite(rms) & (rms > 0)
            ratio = jnp.asarray(bound, rms.dtype) / jnp.where(usable, rms, 1)
            scale = jnp.where(usable, jnp.minimum(ratio, 1), 1)
            return u * scale[:, None, None], scale

        with jax.named_scope("kfac/clip_by_rms"):
            clipped, scales = map_layers(clip, preconditioned, layers=layers)
        smallest = jnp.min(scales, initial=1.0).astype(jnp.float32)
        return clipped, RMSClipState(inner, optax.safe_increment(state.rms_count), smallest, given)

    return optax.GradientTransformationExtraArgs(init, update)
