"""Leading axes of leaves that only count equal parameters, as those of scanned layers."""

import operator
from collections.abc import Callable


def stacked_axes(
    where: str, name: str, shape: tuple[int, ...], stacked: Callable[[str], int] | None
) -> int:
    """The number of leading axes of a leaf that count equal parameters.

    Raises:
      ValueError: `stacked` gives no integer, or more axes than the leaf has.

    >>> print(stacked_axes("here", "blocks/kernel", (6, 3, 4), lambda name: 1))
    1
    """
    given = 0 if stacked is None else stacked(name)
    try:
        number = operator.index(given)
    except TypeError:
        number = -1
    if not 0 <= number <= len(shape):
        raise ValueError(
            f"{where}: stacked({name!r}) is {given!r} for a leaf of shape {shape}; expected the number "
            f"of leading axes that count equal parameters, an integer from 0 to {len(shape)}."
        )
    return number
