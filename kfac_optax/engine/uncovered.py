"""Gradients without a block get the size of the preconditioned updates, `uncovered="graft"`."""

import jax
import jax.numpy as jnp

from kfac_optax._parts import boxes_left, size_of, with_box, within_box
from kfac_optax._tree import covered_leaves, grafted_leaves, named_leaves, present, replace_leaves
from kfac_optax._types import Layers, PyTree
from kfac_optax.step_rules._per_layer import largest_or_one, root_mean_square, within

# what becomes of parameters without a block in presets that measure no single ones
WITHOUT_DIAGONAL = ("pass", "graft", "raise")


def graft_uncovered(updates: PyTree, layers: Layers) -> PyTree:
    """Gradients of parameters without a block, rescaled.

    `g_j <- g_j rms(U) / rms(g_j)` for every leaf `g_j` without a block that the model uses, and
    every box that no layer has of a leaf that layers share out, with `U` the preconditioned updates
    of all parameters that have one, and `rms` the root of the mean square of the entries. So one
    rate fits all parameters, whatever the scale of the loss. A gradient that vanishes stays zero.

    Args:
      updates: preconditioned where there are blocks, gradients elsewhere.
      layers: as covered, so `graft` says whether anything is to be done.

    Returns:
      A tree like `updates`; the same one where nothing is to be done.

    >>> from kfac_optax._types import Layer, Layout
    >>> dense = Layer("w", "dense", "w", None, 2, 1, Layout((2, 1), (2, 1), (0, 1)))
    >>> updates = {"scale": jnp.array([300.0, -400.0]), "w": jnp.full((2, 1), 5.0)}
    >>> print(graft_uncovered(updates, Layers((dense,), graft=True))["scale"].round(3))
    [ 4.243 -5.657]

    Reference: Agarwal, Anil, Hazan, Koren & Zhang, Disentangling Adaptive Gradient Methods from
    Learning Rates (2020), on grafting; here the size is that of the other parameters.
    """
    left, leaves = grafted_leaves(updates, layers), named_leaves(updates)
    rest = boxes_left(present(layers, leaves)) if layers.graft else {}
    if not left and not rest:
        return updates
    with jax.named_scope("kfac/graft_uncovered"):
        idle = sum(map(size_of, rest.values()))
        wanted = root_mean_square(covered_leaves(updates, layers), idle)
        new = {name: _with_size(x, wanted) for name, x in left.items()}
        # of leaves that layers share out what none has, each box on its own
        for name, boxes in rest.items():
            new[name] = leaves[name]
            for box in boxes:
                x = _with_size(within_box(leaves[name], box), wanted)
                new[name] = with_box(new[name], box, x)
        return replace_leaves(updates, new)


def _with_size(x: jax.Array, wanted: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(wanted.dtype, x.dtype))
    # by the largest entry first: squares of what is left neither over- nor underflow together
    even = wide / largest_or_one({"": wide}).astype(wide.dtype)
    size = jnp.sqrt(jnp.mean(jnp.square(jnp.abs(even))))
    # a size that is no number passes through: the step is left out as a whole, and counted
    scaled = even / jnp.where(size == 0, 1, size) * wanted
    return within(jnp.where(size == 0, 0, scaled), x.dtype)
