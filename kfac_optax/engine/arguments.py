"""What a preconditioner is given, checked: parameters, gradients and curvature."""

from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import present
from kfac_optax._types import Block, Layer, Layers
from kfac_optax._validate import check_legal
from kfac_optax.estimators.plan import Plan


def check_numbers(where, damping, decay, curvature_every, inverse_every) -> None:
    """Checks the numbers of a preconditioner that are known already."""
    check_legal(where, "damping", damping)
    check_legal(where, "decay", decay)
    check_legal(where, "curvature_every", curvature_every)
    check_legal(where, "inverse_every", inverse_every)


def check_factored(where: str, blocks: tuple[Block, ...]) -> None:
    """Checks that some block can solve for the rows of a gradient.

    Raises:
      ValueError: none can.
    """
    if all(b.solve_rows is None for b in blocks):
        names = ", ".join(sorted({b.name for b in blocks}))
        raise ValueError(
            f"{where}: got factored_gradient=True, but no block can solve for rows: {names}. "
            "Expected one of low_rank or kronecker('cholesky'): pass inverse='cholesky', or take a "
            "preset of low rank."
        )


def own_layers(where: str, layers: Layers, leaves: dict[str, jax.Array]) -> tuple[Layer, ...]:
    """The layers whose weights are among the leaves.

    Raises:
      ValueError: there is none, or a weight has another shape than it had.
    """
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


def factors_dtype(leaves: dict[str, jax.Array], mine: tuple[Layer, ...], factor_dtype: Any) -> Any:
    """In which factors and inverses are kept."""
    if factor_dtype is not None:
        return jnp.dtype(factor_dtype)
    # at least single precision: half would lose the small eigenvalues of factors
    return jnp.result_type(jnp.float32, *(leaves[layer.kernel].dtype for layer in mine))


def check_curvature(where: str, curvature: Any) -> None:
    """Checks that statistics can be asked for.

    Raises:
      TypeError: of something else.
    """
    if not hasattr(curvature, "statistics"):
        raise TypeError(
            f"{where}.update: curvature is a {type(curvature).__name__}; expected "
            "fisher.at(params, *args, key=key) or None."
        )


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
