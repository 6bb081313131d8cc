"""Equations that cut, regroup or repeat numbers, and how."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.capture.jaxpr.rewriting import renamed
from kfac_optax.capture.kernels.slices import Cut


def regroups(eqn: Any, out: Any) -> bool:
    """Whether an equation keeps all numbers in their order."""
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        # axes of length one come in
        axes = list(eqn.params["broadcast_dimensions"])
        in_order = axes == sorted(axes)
        return in_order and eqn.invars[0].aval.size == out.aval.size
    return name in ("reshape", "squeeze", "expand_dims")


def cuts_of(eqn: Any, out: Any) -> list[Cut]:
    """How an equation cuts its operand; the last axes first, as axes may go."""
    name = eqn.primitive.name
    shape = out.aval.shape
    if 0 in shape:
        return []
    if name == "squeeze":
        dropped = sorted(eqn.params["dimensions"], reverse=True)
        return [Cut(axis, 0, None) for axis in dropped]
    if name == "split":
        starts = _starts_of_piece(eqn, out)
    elif name == "slice" and set(eqn.params["strides"] or (1,)) == {1}:
        starts = eqn.params["start_indices"]
    else:
        return []
    # an axis of which all is left is not cut
    old = eqn.invars[0].aval.shape
    cuts = []
    for axis, (start, n) in enumerate(zip(starts, shape, strict=True)):
        if n != old[axis]:
            cuts.append(Cut(axis, start, n))
    return cuts


def _starts_of_piece(eqn: Any, piece: Any) -> list[int]:
    """Where one output of a `split` begins: behind those before it."""
    axis = eqn.params["axis"]
    number = eqn.outvars.index(piece)
    starts = [0] * len(piece.aval.shape)
    starts[axis] = sum(v.aval.shape[axis] for v in eqn.outvars[:number])
    return starts


def scalar_and_other(eqn: Any) -> tuple[Any, Any]:
    """The side of a product that is a scalar, for a quotient the divisor, and the other one; twice
    `None` where there is none.
    """
    first, second = eqn.invars
    if second.aval.shape == ():
        return second, first
    if first.aval.shape == () and eqn.primitive.name == "mul":
        return first, second
    return None, None


def spread_over(v: Any, axes: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Axes of an array of that shape along which the numbers of a value differ that is repeated.

    Args:
      v: the value.
      axes: where each of its axes is.
      shape: of the array.
    """
    pairs = zip(axes, v.aval.shape, strict=True)
    return tuple(axis for axis, n in pairs if n == shape[axis] > 1)


def squeezed(v: Any) -> tuple[list[Any], Any]:
    """Equations that drop axes of length one of a value, and what they make."""
    if 1 not in v.aval.shape:
        return [], v
    return _written(jnp.squeeze, v)


def _written(function: Callable[[jax.Array], jax.Array], v: Any) -> tuple[list[Any], Any]:
    """Equations of a function of one value, and what they make."""
    closed = jax.make_jaxpr(function)(v.aval)
    equations, (out,) = renamed(closed.jaxpr, [v])
    return equations, out


def pads(eqn: Any) -> bool:
    """Whether a `pad` puts numbers around its operand, and takes nothing away."""
    # (low, high, between neighbours) of each axis
    config = eqn.params["padding_config"]
    return all(low >= 0 <= high and not inner for low, high, inner in config)


def filled(shape: Sequence[int], value: Any) -> tuple[list[Any], Any]:
    """Equations that repeat a scalar, and what they make."""
    return _written(lambda x: jax.lax.broadcast_in_dim(x, shape, ()), value)


def slice_of(v: Any, cut: Cut) -> tuple[list[Any], Any]:
    """Equations that cut a value, and what they make."""
    return _written(functools.partial(piece, cut), v)


def piece(cut: Cut, x: jax.Array) -> jax.Array:
    """The slice of an array."""
    # one number, and without its axis, where the cut has no size
    start = cut.start or 0
    size = cut.size or 1
    piece = jax.lax.slice_in_dim(x, start, start + size, axis=cut.axis)
    return jax.lax.squeeze(piece, [cut.axis]) if cut.size is None else piece
