"""KL-clip: caps the predicted KL divergence of a step, over any preconditioner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import Layers, PyTree, ScalarOrSchedule, Sloped
from kfac_optax._validate import Checked, check_legal, checked, start_checked
from kfac_optax.linalg.powers import Scaled
from kfac_optax.step_rules._per_layer import inner_products, inverse_root_of, scale_layers


class KLClipState(NamedTuple):
    """State of `clip_by_kl`: that of the preconditioner, the step count, and the last factor `nu`."""

    preconditioner: PyTree
    kl_count: Any  # shape=(), dtype=int32
    kl_scale: jax.Array  # shape=(), dtype=float32
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


def clip_by_kl(
    preconditioner: optax.GradientTransformation,
    *,
    learning_rate: ScalarOrSchedule | None,
    kl_clip: ScalarOrSchedule | None = 1e-3,
    layers: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the output of a preconditioner so that a step's squared Fisher norm stays below
    `kl_clip`.

    `nu = min(1, sqrt(kl_clip / (learning_rate^2 sum_i |<U_i, V_i>|)))` with `V_i` the raw gradient
    of layer i and `U_i` what the preconditioner made of it; `U = P V` with `P ~ (F + damping)^{-1}`
    makes `<U, V>` the squared Fisher norm of `U`. `nu = 1` where the sum vanishes or an entry is
    not finite; products are formed so that the sum itself cannot overflow.

    Args:
      preconditioner: any transformation; extra arguments are handed on. Where it knows
        `<U_i, V_i>` itself (`sloped=True` of `scale_by_curvature`), they are not formed here.
      learning_rate: the rate that the following transformations apply; only used in the formula,
        `None` only where clipping is off. Checked there too if given, but not read.
      kl_clip: the bound; `None` switches clipping off (the state keeps its form).
      layers: only these layers are summed and scaled, with what was given their size
        (`uncovered="graft"` of the table); default: every leaf is a layer.

    Returns:
      A transformation; its state shows the last `nu` as `kl_scale`.

    Raises:
      ValueError: `kl_clip` or `learning_rate` not positive.

    >>> tx = clip_by_kl(optax.identity(), learning_rate=1.0, kl_clip=1.0)
    >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> print(updates, state.kl_scale)
    [0.6 0.8] 0.2

    Reference: Tselepidis, Kohler & Orvieto (2020), equation (10); Ba, Grosse & Martens (2017).
    """
    if kl_clip is not None:
        check_legal("clip_by_kl", "kl_clip", kl_clip)
    # a rate that is not read is still one that was meant
    if kl_clip is not None or learning_rate is not None:
        check_legal("clip_by_kl", "learning_rate", learning_rate)
    preconditioner = optax.with_extra_args_support(preconditioner)

    def init(params: PyTree) -> KLClipState:
        given = start_checked(learning_rate=learning_rate, kl_clip=kl_clip)
        count, scale = jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32)
        return KLClipState(preconditioner.init(params), count, scale, given)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ):
        preconditioned, inner = preconditioner.update(
            updates, state.preconditioner, params, **extra
        )
        count = optax.safe_increment(state.kl_count)
        # products with the gradient that the preconditioner knows already
        products = None
        if isinstance(preconditioned, Sloped):
            products = Scaled(preconditioned.slopes, preconditioned.exponent)
            preconditioned = preconditioned.update
        if kl_clip is None or learning_rate is None:
            return preconditioned, KLClipState(inner, count, state.kl_scale, state.given)
        # values that make no sense leave the last good ones
        rate, given = checked(state.given, "learning_rate", learning_rate, state.kl_count)
        bound, given = checked(given, "kl_clip", kl_clip, state.kl_count)
        with jax.named_scope("kfac/kl_clip"):
            if products is None:
                products = inner_products(preconditioned, updates, layers)
            scale = _scale(products, rate, bound)
            clipped = scale_layers(preconditioned, scale, layers)
        return clipped, KLClipState(inner, count, scale.astype(jnp.float32), given)

    return optax.GradientTransformationExtraArgs(init, update)


def kl_scale(
    preconditioned: PyTree,
    gradients: PyTree,
    learning_rate: Any,
    kl_clip: Any,
    layers: Layers | None = None,
) -> jax.Array:
    """The factor `nu = min(1, sqrt(kl_clip / (learning_rate^2 sum_i |<U_i, V_i>|)))`.

    >>> print(kl_scale(jnp.array([3.0, 4.0]), jnp.array([3.0, 4.0]), 1.0, 1.0))
    0.2
    """
    # <U_i, V_i> of every layer, apart from a common power of two
    products = inner_products(preconditioned, gradients, layers)
    return _scale(products, learning_rate, kl_clip)


def _scale(products: Scaled, learning_rate: Any, kl_clip: Any) -> jax.Array:
    total = jnp.sum(jnp.abs(products.values))
    return inverse_root_of(total, products.exponent, learning_rate, kl_clip)
