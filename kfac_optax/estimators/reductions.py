"""Sums over the devices that share a batch."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._layout import varying_axes
from kfac_optax._types import PyTree, Travel
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.linalg.packing import pack, unpack


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


def mean_over_devices(tree: PyTree, axis_name: Any, travel: Travel) -> PyTree:
    """Means of statistics over devices, sent as `travel` says.

    Args:
      tree: statistics; the matrices of `Factors` are symmetric.
      axis_name: mapped axis, several or none.
      travel: in which form they travel.
    """
    if not names_of(axis_name):
        return tree
    if not travel.packed and travel.dtype is None:
        return jax.lax.pmean(tree, axis_name)

    def mean(x: jax.Array) -> jax.Array:
        if travel.dtype is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.lax.pmean(x, axis_name)
        # divided first, so that the sum cannot overflow
        share = (x / devices_of(axis_name)).astype(travel.dtype)
        return jax.lax.psum(share, axis_name).astype(x.dtype)

    def packed_mean(x: jax.Array) -> jax.Array:
        # copies are on axis 0: as many vectors as they are long make no matrix
        square = x.ndim >= 3 and x.shape[-1] == x.shape[-2]
        return unpack(mean(pack(x)), x.shape[-1]) if square else mean(x)

    def of_node(node: PyTree) -> PyTree:
        symmetric = travel.packed and isinstance(node, Factors)
        return jax.tree.map(packed_mean if symmetric else mean, node)

    return jax.tree.map(of_node, tree, is_leaf=lambda node: isinstance(node, Factors))


def names_of(axis_name: Any) -> tuple[Any, ...]:
    """The names of a mapped axis: one, several or none."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _type(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
