"""Products along one axis of stacked tensors `[copies, n_1, ..., n_k]`."""

import functools
import string

import jax
import jax.numpy as jnp

from kfac_optax.methods.gradient.axes import DIAGONAL

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def statistic(tensors: jax.Array, axis: int, kind: str) -> jax.Array:
    """`mat_i(G) mat_i(G)^T` of every tensor, `[copies, n, n]`, or its diagonal, `[copies, n]`.

    >>> g = jnp.array([[[1.0, 2.0], [0.0, 1.0]]])
    >>> print(statistic(g, 0, "full")[0], statistic(g, 0, "diagonal")[0])
    [[5. 2.]
     [2. 1.]] [5. 1.]
    """
    mine, other = _letters(tensors, axis)
    # sum over all other axes of G_j^2
    letter = mine[axis + 1]
    if kind == DIAGONAL:
        return _einsum(f"{mine},{mine}->z{letter}", tensors, tensors)
    # sum over all other axes of G_j G_k
    return _einsum(f"{mine},{other}->z{letter}Z", tensors, tensors)


def unfolded(tensors: jax.Array, axis: int) -> jax.Array:
    """`mat_i(G)` of every tensor, `[copies, n, rest]`.

    >>> print(unfolded(jnp.arange(6.0).reshape(1, 2, 3), 1)[0])
    [[0. 3.]
     [1. 4.]
     [2. 5.]]
    """
    # [copies, n_i, others] to [copies, n_i, rest]
    first = jnp.moveaxis(tensors, axis + 1, 1)
    return first.reshape(*first.shape[:2], -1)


def along(tensors: jax.Array, axis: int, matrices: jax.Array) -> jax.Array:
    """`G x_i M`: every tensor multiplied by its matrix `[n, m]` from the left along an axis of
    length `m`, or by the diagonal `[n]` of one.

    >>> print(along(jnp.ones((1, 2, 3)), 0, jnp.array([[[1.0, 1.0], [0.0, 1.0]]]))[0])
    [[2. 2. 2.]
     [1. 1. 1.]]
    """
    mine, other = _letters(tensors, axis)
    letter = mine[axis + 1]
    if matrices.ndim == 2:
        # a diagonal: one number for every entry of the axis
        return jnp.einsum(f"{mine},z{letter}->{mine}", tensors, matrices)
    return _einsum(f"{mine},zZ{letter}->{other}", tensors, matrices)


def _letters(tensors: jax.Array, axis: int) -> tuple[str, str]:
    # z the copies, Z the axis behind the product
    letters = string.ascii_lowercase[: tensors.ndim - 1]
    before, behind = letters[:axis], letters[axis + 1 :]
    return f"z{letters}", f"z{before}Z{behind}"
