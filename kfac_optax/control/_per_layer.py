"""What step rules need of layers: inner products, one scale for all of them, or a function of each."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import gather, make_buckets, named_leaves, present, replace_leaves, scatter
from kfac_optax._types import Layers, PyTree


def inner_products(left: PyTree, right: PyTree, layers: Layers | None) -> jax.Array:
    """`<left_i, right_i>` of every layer, `[k]`; without `layers` every leaf is one.

    >>> print(inner_products({"a": jnp.ones(2), "b": jnp.ones(1)}, {"a": jnp.ones(2), "b": -jnp.ones(1)}, None))
    [ 2. -1.]
    """
    u, v = named_leaves(left), named_leaves(right)
    dtype = _wide(v)
    if layers is None:
        parts = [jnp.sum(u[n].astype(dtype) * v[n].astype(dtype))[None] for n in v]
    else:
        buckets = make_buckets(present(layers, v))
        parts = [jnp.sum(gather(b, u, dtype) * gather(b, v, dtype), axis=(1, 2)) for b in buckets]
    return jnp.concatenate(parts) if parts else jnp.zeros((1,), dtype)


def covered_leaves(tree: PyTree, layers: Layers | None) -> dict[str, jax.Array]:
    """The leaves of the layers by name; without `layers` all of them."""
    leaves = named_leaves(tree)
    if layers is None:
        return leaves
    mine = present(layers, leaves)
    names = {layer.kernel for layer in mine} | {layer.bias for layer in mine if layer.bias is not None}
    return {name: x for name, x in leaves.items() if name in names}


def scale_layers(tree: PyTree, scale: jax.Array, layers: Layers | None) -> PyTree:
    """`tree` with the leaves of the layers multiplied by one number."""
    return replace_leaves(tree, {n: x * scale.astype(x.dtype) for n, x in covered_leaves(tree, layers).items()})


def map_layers(function: Callable[..., tuple[jax.Array, Any]], *trees: PyTree, layers: Layers | None) -> tuple:
    """Applies a function to the matrices of every layer, kernel and bias together.

    Args:
      function: gets `[copies, p, q]` of every tree, for layers of one shape at once, and returns the new matrices and
        something to report of each copy, `[copies]`.
      *trees: updates with the same leaves.
      layers: kernel and bias of each make a layer, and so does every other leaf on its own.

    Returns:
      A tree like the first, and the reports, `[number of matrices]`.
    """
    leaves = [named_leaves(tree) for tree in trees]
    dtype = _wide(leaves[0])
    new: dict[str, jax.Array] = {}
    reports = [jnp.zeros((0,), dtype)]
    grouped = () if layers is None else make_buckets(present(layers, leaves[0]))
    for bucket in grouped:
        matrices, report = function(*(gather(bucket, x, dtype) for x in leaves))
        new |= scatter(bucket, matrices, leaves[0])
        reports.append(report)
    for name in [n for n in leaves[0] if n not in new]:
        matrix, report = function(*(x[name].astype(dtype).reshape(1, 1, -1) for x in leaves))
        new[name] = matrix.reshape(leaves[0][name].shape)
        reports.append(report)
    return replace_leaves(trees[0], new), jnp.concatenate(reports)


def like_parameters(params: PyTree, leaves: Mapping[str, jax.Array]) -> PyTree:
    """A tree like the parameters with these leaves, zero elsewhere: what is masked has no part in a direction."""
    return replace_leaves(jax.tree.map(jnp.zeros_like, params), leaves)


def require_curvature(where: str, why: str, curvature: Any) -> Any:
    """The extra argument `curvature`, or an error that shows the line to write."""
    if curvature is None:
        raise ValueError(
            f"{where}.update got no `curvature`, which {why} needs in every step. Pass the lazy curvature of this batch,\n\n"
            '    tx.update(grads, opt_state, params, curvature=fisher.at(params, batch["x"], key=key))\n\n'
            "To take no statistics in a step, give the preconditioner inside a period instead (`curvature_every`)."
        )
    return curvature


def _wide(leaves: Mapping[str, jax.Array]) -> Any:
    return jnp.result_type(jnp.float32, *leaves.values())
