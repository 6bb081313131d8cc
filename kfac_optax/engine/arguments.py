"""What a preconditioner is given, checked: parameters, gradients, curvature and placement."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import present
from kfac_optax._types import Block, Coupling, Layer, Layers, Travel
from kfac_optax._validate import check_legal
from kfac_optax.engine.placement import Placement
from kfac_optax.estimators.plan import Plan
from kfac_optax.estimators.reductions import names_of


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


def check_factor_dtype(where: str, factor_dtype: Any) -> None:
    """Checks that factors can be kept in a dtype.

    Raises:
      TypeError: it is none of floating numbers.

    >>> check_factor_dtype("kfac", "int32")
    Traceback (most recent call last):
    TypeError: kfac: factor_dtype='int32'; expected a dtype of floating numbers, or None.
    """
    if factor_dtype is None:
        return
    try:
        floating = jnp.issubdtype(jnp.dtype(factor_dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(
            f"{where}: factor_dtype={factor_dtype!r}; expected a dtype of floating numbers, or None."
        )


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


def checked_placement(
    where: str, placement: Placement | None, parts: int, factored_gradient: bool, axis_name: Any
) -> Placement | None:
    """The placement of a transformation, or `None` where it has nothing to say: on one device.

    Raises:
      ValueError: it divides the state, and something needs all of it.
      TypeError: it is something else.
    """
    if placement is None:
        return None
    if not isinstance(placement, Placement):
        raise TypeError(
            f"{where}: placement is a {type(placement).__name__}; expected a Placement, such as "
            'Placement("data", mesh=mesh), or None.'
        )
    if placement.divided and (parts > 1 or factored_gradient):
        word = "stagger" if parts > 1 else "factored_gradient"
        raise ValueError(
            f"{where}: got {word}= with worker_fraction={placement.worker_fraction!r}, which "
            "divides the inverses over devices; expected all devices to keep all of them. Pass "
            f"worker_fraction=1, or leave {word}= out."
        )
    if placement.owned and parts > 1:
        raise ValueError(
            f"{where}: got stagger={parts} with statistics={placement.statistics!r}, which divides "
            "the factors over devices; expected one refresh of all. Leave stagger= out, or use "
            "statistics='averaged'."
        )
    if placement.travel != Travel() and axis_name is None:
        raise ValueError(
            f"{where}: got a placement with packed={placement.packed!r}, statistics_dtype="
            f"{placement.statistics_dtype!r} and statistics_bits={placement.statistics_bits!r}, and "
            "axis_name=None; expected axis_name=, the axis of shard_map or pmap over which "
            "statistics are summed. Under jit XLA decides what it sends: leave them out."
        )
    return None if placement.mesh is not None and placement.devices == 1 else placement


def check_owned(
    where: str,
    placement: Placement | None,
    layers: Layers,
    blocks: Sequence[Block],
    coupling: Coupling | None,
    axis_name: Any,
) -> None:
    """Checks that statistics which one device each has are all that is needed.

    Raises:
      ValueError: something needs those of all layers, or what is local of the whole batch.
    """
    if placement is None or not placement.owned:
        return
    got = f"{where}: got statistics={placement.statistics!r}"
    missing = [name for name in placement.names if name not in names_of(axis_name)]
    if missing:
        raise ValueError(
            f"{got} over axis {missing[0]!r}, and axis_name={axis_name!r}; expected axis_name= to "
            "name it: the batch is split over it, inside shard_map or pmap."
        )
    if coupling is not None:
        raise ValueError(
            f"{got} with the coupling {coupling.name}, which needs the factors of all layers; "
            "expected no coupling. Use statistics='averaged'."
        )
    for layer, block in zip(layers, blocks, strict=True):
        # what takes statistics into its inverse needs them wherever that is kept
        if block.absorb is not None and placement.workers > 1:
            raise ValueError(
                f"{got} with worker_fraction={placement.worker_fraction!r}, and layer "
                f"{layer.path!r} has block {block.name!r}, which takes every statistic into its "
                "inverse; expected one device to keep each. Pass worker_fraction=0, or use "
                "statistics='averaged'."
            )
        if placement.local:
            _check_part(got, layer, block)


def _check_part(got: str, layer: Layer, block: Block) -> None:
    """Raises where a layer is measured on the whole batch or not at all."""
    # the gradient of a bare parameter is a sum over devices, where that is tracked
    if layer.kind == "diagonal":
        raise ValueError(
            f"{got}, and parameter {layer.path!r} without inputs, which is measured on the whole "
            "batch; expected layers alone. Pass uncovered='pass', or use statistics='averaged'."
        )
    # so is that of a loss that devices have averaged before it was differentiated
    if block.first_moments:
        raise ValueError(
            f"{got}, and layer {layer.path!r} has block {block.name!r}, which averages gradients "
            "themselves, those of the whole batch; expected blocks of their products. Use "
            "statistics='averaged'."
        )
