"""The rows of `J / sqrt(N)` of all devices as flat vectors, and what they are products with."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import named_leaves
from kfac_optax._types import PyTree
from kfac_optax.linalg.gram import as_replicated
from kfac_optax.step_rules._per_layer import like_parameters

Leaves = dict[str, jax.Array]


class Space(NamedTuple):
    """`J / sqrt(N)` between leaves of the gradient, by name, and flat vectors of all rows.

    Attributes:
      forward: `leaves -> [n]`.
      adjoint: `[n] -> leaves`.
      flat: `(a vector in sample space) -> [n]`, as it comes from the user, divided by `sqrt(N)`.
      size: n, the rows of all devices.
      heads: shapes of the vectors in sample space of one device.
      examples: N of all devices.
    """

    forward: Callable[[Leaves], jax.Array]
    adjoint: Callable[[jax.Array], Leaves]
    flat: Callable[[PyTree], jax.Array]
    size: int
    heads: tuple[tuple[int, ...], ...]
    examples: int


def sample_space(
    where: str,
    jacobian: Any,
    params: PyTree,
    names: Sequence[str],
    dtype: Any,
    axis_name: Any,
) -> Space:
    """Products with the columns of `J` that belong to these leaves.

    Args:
      where: for errors.
      jacobian: of `curvature.linearize()`.
      params: of the curvature.
      names: of the leaves of the gradient; under `optax.masked` they are some of the parameters.
      dtype: of the vectors.
      axis_name: mapped axis over which the batch is split.
    """
    # shapes of the outputs, by head
    shapes = jax.eval_shape(jacobian.jvp, params)
    treedef = jax.tree.structure(shapes)
    leaves = jax.tree.leaves(shapes)
    mine = sum(x.size for x in leaves)
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    # 1 / sqrt(N), on each side of J J^T
    scale = jacobian.examples**-0.5

    def flat(rows: PyTree) -> jax.Array:
        heads = map(as_replicated, jax.tree.leaves(rows))
        parts = [jnp.ravel(x).astype(dtype) for x in heads]
        # [N, ...] of every head to one vector, then that of all devices
        own = scale * jnp.concatenate(parts)
        return of_all_devices(own, axis_name)

    # J v / sqrt(N)
    def forward(vector: Leaves) -> jax.Array:
        return flat(jacobian.jvp(like_parameters(params, vector)))

    # J^T u / sqrt(N)
    def adjoint(u: jax.Array) -> Leaves:
        if axis_name is not None:  # the rows of this device
            start = jax.lax.axis_index(axis_name) * mine
            u = jax.lax.dynamic_slice(u, (start,), (mine,))
        parts, start = [], 0
        for x in leaves:
            end = start + x.size
            part = u[start:end].reshape(x.shape)
            parts.append(part.astype(x.dtype))
            start = end
        product = named_leaves(jacobian.vjp(treedef.unflatten(parts)))
        return {name: scale * product[name].astype(dtype) for name in names}

    def given(rows: PyTree) -> jax.Array:
        # rows of the residual are those of J, output by output
        shapes = [jnp.shape(x) for x in jax.tree.leaves(rows)]
        expected = [x.shape for x in leaves]
        if shapes != expected:
            raise ValueError(
                f"{where}: residual has arrays of shapes {shapes}; expected {expected}, one "
                "number for every row of the curvature's J."
            )
        return flat(rows)

    heads = tuple(x.shape for x in leaves)
    return Space(forward, adjoint, given, mine * devices, heads, jacobian.examples)


def of_all_devices(rows: jax.Array, axis_name: Any) -> jax.Array:
    """Rows `[n]` of every device one after another."""
    if axis_name is None:
        return rows
    devices = jax.lax.axis_size(axis_name)
    mine = jax.lax.axis_index(axis_name)
    # a sum, unlike all_gather, gives what shard_map knows to be the same on all devices
    # [devices, n], zero but for the rows of this one
    nothing = jnp.zeros((devices, *rows.shape), rows.dtype)
    apart = nothing.at[mine].set(rows)
    together = jax.lax.psum(apart, axis_name)
    return together.reshape(-1, *rows.shape[1:])
