"""Errors that several blocks raise."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

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
