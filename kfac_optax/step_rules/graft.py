"""Grafting: the direction of one transformation with the layer-wise norm of another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._types import Layers, PyTree
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.step_rules._per_layer import map_layers, norms


class GraftState(NamedTuple):
    """State of `graft_norm`: that of the transformation that gives the direction, and of the one
    that gives the norm.
    """

    preconditioner: PyTree
    graft: PyTree


def graft_norm(
    preconditioner: optax.GradientTransformation,
    *,
    norm_of: optax.GradientTransformation | None = None,
    layers: Layers | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of a preconditioner, layer by layer with the norm that another transformation
    would give.

    `S_i <- S_i ||Q_i|| / ||S_i||` with `S` the output of the preconditioner and `Q` that of
    `norm_of`, both made from the same gradient. The step size then is tuned as for `norm_of`. A
    layer whose direction vanishes stays zero. Every matrix of a stacked or grouped layer has its
    own norm.

    Args:
      preconditioner: gives the direction; extra arguments are handed to both.
      norm_of: gives the norm, for example `optax.scale_by_adam()`; default `optax.identity()`, the
        norm of the gradient.
      layers: kernel and bias of each make a layer, and so does every other leaf on its own;
        default: every leaf is a layer.

    Returns:
      A transformation whose state holds both states.

    >>> tx = graft_norm(optax.scale_by_sign())
    >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> print([f"{u:.4f}" for u in updates])
    ['3.5355', '3.5355']

    Reference: Anil, Gupta, Koren, Regan & Singer, Scalable Second Order Optimization for Deep
      Learning (2020), section 4.
    """
    direction_of = optax.with_extra_args_support(preconditioner)
    length_of = optax.with_extra_args_support(optax.identity() if norm_of is None else norm_of)

    def init(params: PyTree) -> GraftState:
        return GraftState(direction_of.init(params), length_of.init(params))

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra: Any,
    ):
        # both see the same gradient
        direction, inner = direction_of.update(updates, state.preconditioner, params, **extra)
        lengths, graft = length_of.update(updates, state.graft, params, **extra)

        return exchange_norms(direction, lengths, layers), GraftState(inner, graft)

    return optax.GradientTransformationExtraArgs(init, update)


def exchange_norms(
    direction: PyTree,
    lengths: PyTree,
    layers: Layers | None = None,
) -> PyTree:
    """`S_i ||Q_i|| / ||S_i||`, layer by layer, see `graft_norm`."""

    def exchange(s: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        # [copies] Frobenius norms of the matrices [copies, p, q]
        norm, wanted = norms(s), norms(q)
        # of many large entries; NaN stays
        wanted = jnp.minimum(wanted, jnp.finfo(wanted.dtype).max)
        ratio = wanted / positive_or_one(norm)
        return s * ratio[:, None, None], ratio

    with jax.named_scope("kfac/graft_norm"):
        grafted, _ = map_layers(exchange, direction, lengths, layers=layers)
    return grafted
