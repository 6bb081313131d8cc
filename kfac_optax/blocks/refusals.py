"""Errors that several blocks raise."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from kfac_optax._types import Block, Layer

INSTEAD = "another block (kronecker)"


def given_outputs(
    where: str,
    g: Array | None,
    instead: str = INSTEAD,
) -> Array:
    """Output gradients, of which a block makes its statistic.

    Args:
      where: the block.
      g: output gradients, if any.
      instead: what takes none.

    Raises:
      ValueError: there are none.

    >>> given_outputs("here", None)
    Traceback (most recent call last):
    ValueError: here: needs output gradients, but this estimator measures inputs only. Use ...
    """
    # estimators that run forward only have no output gradients to give
    if g is None:
        raise ValueError(
            f"{where}: needs output gradients, but this estimator measures inputs only. Use "
            f"fisher, ggn or empirical_fisher, or {instead}."
        )
    return g


def without_product(where: str, what: str = "no average of the factors") -> Callable[..., Any]:
    """`multiply` of a block whose statistic is not the curvature: raises.

    >>> without_product("here")(None, None)
    Traceback (most recent call last):
    ValueError: here: no average of the factors is kept to multiply with. Ask the exact ...
    """

    # called only where something asks for products with F
    def multiply(statistic: Any, v: Array) -> Array:
        raise ValueError(
            f"{where}: {what} is kept to multiply with. Ask the exact curvature instead (a trust "
            "region in the exact metric), or take kfac."
        )

    return multiply


def of_all_positions(block: Block, word: str, layer: Layer, rows: Block) -> Block:
    """A block that measures every position by itself, where nothing else is asked for.

    Args:
      block: the block.
      word: that gives it to the layer, for the error.
      layer: the layer.
      rows: the block of other layers, which says how positions are measured.

    Raises:
      ValueError: positions are pooled, or some are left out.
    """
    if rows.sharing == "expand" and rows.positions is None:
        return block
    raise ValueError(
        f"blocks_of: {word} gives layer {layer.path!r} the block {block.name!r}, which measures "
        f"every position by itself; got sharing={rows.sharing!r}, positions={rows.positions} beside "
        f"it, expected 'expand' and None. Leave them out, or {word}; for both, each on layers of "
        "its own, pass block= a function of the layer."
    )
