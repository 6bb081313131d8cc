"""Sums over the devices that share a batch."""

import math
from typing import Any

import jax

from kfac_optax._tree import varying_axes
from kfac_optax._types import PyTree


def devices_of(axis_name: Any) -> int:
    """How many devices share the batch; one without an axis.

    >>> print(devices_of(None))
    1
    """
    names = names_of(axis_name)
    return math.prod(jax.lax.axis_size(name) for name in names)


def sum_over_devices(tree: PyTree, axis_name: Any, outputs: PyTree) -> PyTree:
    """Sums what a pullback through a split batch gave over the devices, once.

    Where varying axes are tracked, the transpose of a model on a split batch has summed already.

    Args:
      tree: what each device has.
      axis_name: mapped axis, or several.
      outputs: of the model, arrays or shapes, which show the axes over which the batch is split.
    """
    names = names_of(axis_name)
    if not names:
        return tree
    # axes over which the outputs are split: the transpose sums over those itself
    split = set()
    for x in jax.tree.leaves(outputs):
        split.update(varying_axes(_type(x)))

    def total(x: jax.Array) -> jax.Array:
        # a value that still varies has not been summed; nor has one where nothing is tracked
        mine = varying_axes(jax.typeof(x))
        rest = [name for name in names if name in mine or name not in split]
        return jax.lax.psum(x, tuple(rest)) if rest else x

    return jax.tree.map(total, tree)


def names_of(axis_name: Any) -> tuple[Any, ...]:
    """The names of a mapped axis: one, several or none."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _type(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
