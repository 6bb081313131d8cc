"""Masks whose rows are nested: staircases, once rows and columns are in order."""

from typing import Any

import numpy as np

from kfac_optax._types import Staircase


def staircase(mask: Any, where: str = "staircase") -> Staircase:
    """The staircase that a mask `[p, q]` of ones and zeros is, in some order of rows and columns.

    So it is for masks of autoregressive networks (an output sees the inputs up to its own degree),
    triangles, and rows or columns that are left out.

    Args:
      mask: of ones and zeros, or flags, that are known when tracing.
      where: for errors.

    Raises:
      ValueError: it is no matrix, has other numbers than ones and zeros, or of two rows each has
        entries that the other has not.
      TypeError: it is traced.

    >>> print(staircase([[1, 0, 1], [1, 1, 1]]))
    Staircase(rows=(1, 0), columns=(2, 1, 2))
    """
    try:
        numbers = np.asarray(mask)
    except Exception as problem:
        raise TypeError(
            f"{where}: the mask is a {type(mask).__name__} whose numbers are not known; expected "
            "constants. Make it with NumPy, outside of jit."
        ) from problem
    if numbers.ndim != 2:
        raise ValueError(f"{where}: got a mask of shape {numbers.shape}; expected a matrix [p, q].")
    there = numbers != 0
    # the curvature of `w * 0.5` is another, and so is the gradient
    if (there & (numbers != 1)).any():
        other = numbers[there & (numbers != 1)][0]
        raise ValueError(
            f"{where}: got a mask with {other} in it; expected ones and zeros. Multiply the output "
            "by a factor of the whole weight, and give factors of entries parameters of their own."
        )
    # most entries first: then every row has to be a part of the one before it
    order = np.argsort(-there.sum(1), kind="stable")
    ordered = there[order]
    apart = np.flatnonzero((ordered[1:] & ~ordered[:-1]).any(1))
    if apart.size:
        one, other = order[apart[0]], order[apart[0] + 1]
        raise ValueError(
            f"{where}: rows {one} and {other} of the mask have entries each that the other has not; "
            "expected rows that are nested, as those of an autoregressive network are. A Kronecker "
            "product has no cheap inverse on other masks: leave the tap out, and the weight gets "
            "what uncovered= says."
        )
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    return Staircase(tuple(place.tolist()), tuple(there.sum(0).tolist()))


def entries(stairs: Staircase) -> np.ndarray:
    """The mask, `[p, q]` of flags.

    >>> print(entries(Staircase((1, 0), (2, 1))).astype(int))
    [[1 0]
     [1 1]]
    """
    return np.asarray(stairs.rows)[:, None] < np.asarray(stairs.columns)


def with_bias(stairs: Staircase) -> Staircase:
    """With one more row, the last, that has all entries.

    >>> print(entries(with_bias(Staircase((0,), (1, 0)))).astype(int))
    [[1 0]
     [1 1]]
    """
    rows = tuple(place + 1 for place in stairs.rows)
    return Staircase((*rows, 0), tuple(n + 1 for n in stairs.columns))
