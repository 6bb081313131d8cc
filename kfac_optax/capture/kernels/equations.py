"""Equations that cut, regroup or repeat numbers, and how."""

import functools
from collections.abc import Sequence
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
        return axes == sorted(axes) and eqn.invars[0].aval.size == out.aval.size
    return name in ("reshape", "squeeze", "expand_dims")


def cuts_of(eqn: Any, out: Any) -> list[Cut]:
    """How an equation cuts its operand; the last axes first, as axes may go."""
    p, name, shape = eqn.params, eqn.primitive.name, out.aval.shape
    if 0 in shape:
        return []
    if name == "squeeze":
        return [Cut(axis, 0, None) for axis in sorted(p["dimensions"], reverse=True)]
    starts = [0] * len(shape)
    if name == "split":
        before = eqn.outvars[: eqn.outvars.index(out)]
        starts[p["axis"]] = sum(v.aval.shape[p["axis"]] for v in before)
    elif name == "slice" and set(p["strides"] or (1,)) == {1}:
        starts = p["start_indices"]
    else:
        return []
    old = eqn.invars[0].aval.shape
    sizes = zip(starts, shape, old, strict=True)
    return [Cut(axis, start, n) for axis, (start, n, m) in enumerate(sizes) if n != m]


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
    closed = jax.make_jaxpr(jnp.squeeze)(v.aval)
    equations, (out,) = renamed(closed.jaxpr, [v])
    return equations, out


def pads(eqn: Any) -> bool:
    """Whether a `pad` puts numbers around its operand, and takes nothing away."""
    return all(low >= 0 <= high and not inner for low, high, inner in eqn.params["padding_config"])


def filled(shape: Sequence[int], value: Any) -> tuple[list[Any], Any]:
    """Equations that repeat a scalar, and what they make."""
    closed = jax.make_jaxpr(lambda x: jax.lax.broadcast_in_dim(x, shape, ()))(value.aval)
    equations, (out,) = renamed(closed.jaxpr, [value])
    return equations, out


def slice_of(v: Any, cut: Cut) -> tuple[list[Any], Any]:
    """Equations that cut a value, and what they make."""
    closed = jax.make_jaxpr(functools.partial(piece, cut))(v.aval)
    equations, (out,) = renamed(closed.jaxpr, [v])
    return equations, out


def piece(cut: Cut, x: jax.Array) -> jax.Array:
    """The slice of an array."""
    start, size = cut.start or 0, cut.size or 1
    piece = jax.lax.slice_in_dim(x, start, start + size, axis=cut.axis)
    return jax.lax.squeeze(piece, [cut.axis]) if cut.size is None else piece
