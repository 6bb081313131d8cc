"""Checks of what `scale_by_curvature` and its updates are given."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import present
from kfac_optax._types import Layer, Layers
from kfac_optax._validate import check_legal
from kfac_optax.estimators.plan import Plan


def check_numbers(where, damping, decay, curvature_every, inverse_every) -> None:
    """Raises where a hyperparameter that is a plain number is out of range."""
    # schedules and injected values are looked at in every update
    check_legal(where, "damping", damping)
    check_legal(where, "decay", decay)
    check_legal(where, "curvature_every", curvature_every)
    check_legal(where, "inverse_every", inverse_every)


def gradient_rows(
    where: str, curvature: Any, plan: Plan
) -> dict[Layer, tuple[jax.Array, jax.Array]]:
    """Rows whose products are the gradients of layers.

    Raises:
      ValueError: the curvature knows no gradient.
    """
    if not hasattr(curvature, "gradient_rows"):
        got = "None" if curvature is None else "curvature from fisher.at(...)"
        raise ValueError(
            f"{where}.update: factored_gradient=True and got {got}; expected curvature that shares "
            "its pass with the gradient, in every step: loss, grads, curvature = "
            "fisher.value_and_grad(loss_fn)(params, *args, targets=y, key=key). Statistics still "
            "follow curvature_every (or measure=)."
        )
    return curvature.gradient_rows(plan)


def check_curvature(where: str, curvature: Any) -> None:
    """Raises where `curvature=` is something else, gradients say.

    Raises:
      TypeError: it has no statistics.
    """
    if not hasattr(curvature, "statistics"):
        raise TypeError(
            f"{where}.update: curvature is a {type(curvature).__name__}; expected "
            "fisher.at(params, *args, key=key) or None."
        )


def own_layers(where: str, layers: Layers, leaves: dict[str, jax.Array]) -> tuple[Layer, ...]:
    """The layers whose parameters are among the leaves.

    Raises:
      ValueError: there is none, or a weight has another shape than when `layers` was made.
    """
    # under optax.masked and optax.partition some of them are elsewhere
    mine = present(layers, leaves)
    if not mine:
        raise ValueError(
            f"{where}: none of the layers {', '.join(x.kernel for x in layers)} is among the "
            f"parameters {', '.join(leaves)}. Pass the parameter tree that `layers` was made from."
        )
    for layer in mine:
        got, expected = tuple(leaves[layer.kernel].shape), layer.stored
        if got != expected:
            raise ValueError(
                f"{where}: layer {layer.path!r} has a weight of shape {got}, but {expected} when "
                "`layers` was made. Make it again: layers = fisher.layers(params, *args)."
            )
    return mine


def dtype_of(leaves: dict[str, jax.Array], mine: tuple[Layer, ...], factor_dtype: Any) -> Any:
    """The dtype of factors and inverses: as asked for, or the widest of float32 and the weights'."""
    if factor_dtype is not None:
        return jnp.dtype(factor_dtype)
    return jnp.result_type(jnp.float32, *(leaves[layer.kernel].dtype for layer in mine))
