"""What a saved state looks like, and whether it is that of this model and this version."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from kfac_optax._tree import path_name
from kfac_optax._types import Layer, Layers, PyTree
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.state import STATE_FORMAT


def describe_state(
    opt_state: PyTree,
    params: PyTree,
    layers: Layers | None = None,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """What a state is made of, as plain words to save beside it; `check_state` reads them.

    Args:
      opt_state: any Optax state. Its arrays may be abstract, or sharded in any way.
      params: the parameters that it was made for.
      layers: those of the preconditioner. With them the order in which layers run is part of the
        description: layers of equal shape share arrays, in this order.
      placement: that of the preconditioner, where it divides the state. With it the description
        says which devices have what: another number of them may have arrays of the same shapes.

    Returns:
      A dictionary that JSON can hold: `"format"`, the version of the states' layout; `"parameters"`
      and `"state"`, type and shape of every array by its path; `"layers"`, a line for each in
      order of execution; `"placement"`, how the state is divided.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.zeros((2, 1))}
    >>> state = optax.sgd(0.1, momentum=0.9).init(params)
    >>> print(describe_state(state, params)["state"])
    {'0/trace/w': 'float32[2,1]'}
    """
    description: dict[str, Any] = {
        "format": STATE_FORMAT,
        "parameters": _types(params),
        "state": _types(opt_state),
    }
    # without layers a description is of arrays alone
    if layers is not None:
        description["layers"] = [_words(layer) for layer in layers]
    if placement is not None:
        description["placement"] = _division(placement)
    return description


def check_state(
    found: Any,
    tx: Any,
    params: PyTree,
    layers: Layers | None = None,
    placement: Placement | None = None,
) -> None:
    """Raises unless a saved state is one that `tx` makes for these parameters.

    Nothing is computed: states are compared by the paths, shapes and types of their arrays, not by
    how they are split over devices.

    Args:
      found: from `describe_state`, before anything is restored; or a state as it was restored.
      tx: the transformation that is to go on with it.
      params: the parameters, arrays or their shapes.
      layers: as in `describe_state`; only a description has them.
      placement: as in `describe_state`; so has only a description.

    Raises:
      ValueError: the first difference: another format, placement, model or optimizer.

    >>> import jax.numpy as jnp, optax
    >>> params, wider = {"w": jnp.zeros((2, 1))}, {"w": jnp.zeros((3, 1))}
    >>> saved = describe_state(optax.adam(0.1).init(params), params)
    >>> check_state(saved, optax.adam(0.2), params)
    >>> check_state(saved, optax.adam(0.1), wider)
    Traceback (most recent call last):
    ValueError: check_state: array 'w' of the parameters was saved as float32[2,1]; expected float32[3,1]. ...
    """
    expected = describe_state(jax.eval_shape(tx.init, params), params, layers, placement)
    # arrays without a description, such as a restored tree
    if not _is_description(found):
        _compare("state", _types(found), expected["state"], _OTHER_OPTIMIZER)
        return
    if found["format"] != STATE_FORMAT:
        raise ValueError(
            f"check_state: the state was saved in format {found['format']}; this version of "
            f"kfac_optax has format {STATE_FORMAT}. Restore it with the version that wrote it, or "
            "keep the parameters and start with tx.init(params)."
        )
    if layers is not None and "layers" not in found:
        raise ValueError(
            "check_state: got layers=, but none were saved; expected a description from "
            "describe_state(opt_state, params, layers). Leave them out here too."
        )
    _compare_placements(found.get("placement"), expected.get("placement", _WHOLE))
    # the model before its optimizer: another model has another state as well
    _compare("parameters", found["parameters"], expected["parameters"], _OTHER_MODEL)
    if layers is not None:
        _compare_layers(found["layers"], expected["layers"])
    _compare("state", found["state"], expected["state"], _OTHER_OPTIMIZER)


def _is_description(found: Any) -> bool:
    return isinstance(found, Mapping) and isinstance(found.get("format"), int)


def _types(tree: PyTree) -> dict[str, str]:
    """Type and shape of every array, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): _type(leaf) for path, leaf in leaves}


def _type(leaf: Any) -> str:
    # numbers of Python have a type once they are arrays
    shaped = jax.eval_shape(lambda: leaf) if not hasattr(leaf, "dtype") else leaf
    return f"{shaped.dtype}[{','.join(map(str, shaped.shape))}]"


def _words(layer: Layer) -> str:
    bias = " with bias" if layer.bias is not None else ""
    copies = f", {layer.copies} times" if layer.copies > 1 else ""
    # the path says which part it is only where its parameter has several
    part = "" if layer.part is None else f", part {layer.part}"
    return f"{layer.path}: {layer.kind} {layer.inputs}x{layer.outputs}{bias}{copies}{part}"


def _division(placement: Placement) -> str:
    """How a placement divides a state; who has what follows from it and from the shapes."""
    if not (placement.divided or placement.owned):
        return _WHOLE
    return (
        f"over {placement.devices} devices, each inverse kept by {placement.workers}, statistics "
        f"{placement.statistics}"
    )


def _compare_placements(found: str | None, expected: str) -> None:
    """Raises where a state was divided in another way, or nothing is known about it."""
    # descriptions of whole states need not say so
    if found == expected or (found is None and expected == _WHOLE):
        return
    if found is None:
        raise ValueError(
            f"check_state: got a placement that divides the state {expected}, but none was saved; "
            "expected a description from describe_state(opt_state, params, placement=placement)."
        )
    raise ValueError(
        f"check_state: the state was saved divided {found}; expected it {expected}. Restore it with "
        "the placement that it was made with, and pass that here as placement=; then "
        "divided_state(whole_state(state, old), new) divides it anew."
    )


_WHOLE = "over no devices"
_OTHER_MODEL = "It is of another model: restore it with the code that wrote it."
_OTHER_OPTIMIZER = (
    "It is of another optimizer or other settings of it: make tx as it was, or keep the parameters "
    "and start with tx.init(params)."
)


def _compare(
    where: str,
    found: Mapping[str, str],
    expected: Mapping[str, str],
    advice: str,
) -> None:
    """Raises with the first array in which two descriptions differ."""
    # what is expected first, then what nobody expects
    for name in (*expected, *found):
        got, wanted = found.get(name, "nothing"), expected.get(name, "nothing")
        if got != wanted:
            raise ValueError(
                f"check_state: array {name!r} of the {where} was saved as {got}; expected "
                f"{wanted}. {advice}"
            )


def _compare_layers(found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises with the first layer in which two descriptions differ, or which runs elsewhere."""
    # in order of execution, to the longer of both
    pairs = itertools.zip_longest(found, expected, fillvalue="nothing")
    for place, (got, wanted) in enumerate(pairs):
        if got != wanted:
            raise ValueError(
                f"check_state: layer {place} in order of execution was saved as {got!r}; expected "
                f"{wanted!r}. {_OTHER_MODEL}"
            )
