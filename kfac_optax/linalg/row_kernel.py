"""Inner products of examples' gradients from the rows of a layer, without the gradients."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EXACT = jax.lax.Precision.HIGHEST
_einsum = functools.partial(jnp.einsum, precision=_EXACT)


def row_kernel(
    a: Float[Array, "copies N T p"],
    g: Float[Array, "K copies N T q"],
) -> Float[Array, "NK NK"]:
    """`<D_bk, D_cl>` for the gradients `D_bk = sum_t a_bt g_kbt^T` of a layer, over its copies.

    `sum_ts (a_bt^T a_cs) (g_kbt^T g_lcs)`, or by the gradients themselves where there are so many
    steps that these are smaller. Axes are `(b, k)`, examples first.

    >>> a, g = jnp.array([2.0, 1.0]).reshape(1, 2, 1, 1), jnp.array([3.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> print(row_kernel(a, g))
    [[36.  6.]
     [ 6.  1.]]
    """
    g = jnp.moveaxis(g, 0, 2)  # [copies, N, K, T, q]
    _, n, steps, p = a.shape
    k, q = g.shape[2], g.shape[4]
    # numbers formed: inner products of steps, or whole gradients of examples
    of_steps = n * k * steps**2
    if steps == 1 or of_steps <= p * q:
        # inner products of inputs, x the copies, t and s the steps of examples b and c
        of_inputs = _einsum("xbtp,xcsp->xbtcs", a, a)
        return _by_products(of_inputs, g)
    # sum_t a_bt g_kbt^T
    gradients = _einsum("xbtp,xbktq->bkxpq", a, g)
    return _by_gradients(gradients)


def token_kernel(
    tokens: Int[Array, "copies N T"],
    g: Float[Array, "K copies N T q"],
) -> Float[Array, "NK NK"]:
    """The same of an embedding, whose inputs are unit vectors.

    >>> g = jnp.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1, 1)
    >>> print(token_kernel(jnp.array([[[0], [0], [2]]]), g))
    [[1. 2. 0.]
     [2. 4. 0.]
     [0. 0. 9.]]
    """
    # e_s^T e_t = 1 for the same token, 0 otherwise: [copies, N, T, N, T]
    here = tokens[:, :, :, None, None]
    there = tokens[:, None, None, :, :]
    same = (here == there).astype(g.dtype)
    return _by_products(same, jnp.moveaxis(g, 0, 2))


def channel_kernel(
    a: Float[Array, "copies N T q"],
    g: Float[Array, "K copies N T q"],
    *,
    scale_and_shift: bool,
) -> Float[Array, "NK NK"]:
    """The same of `y = a scale + shift`, whose gradients are `sum_t g a` and `sum_t g`.

    >>> a, g = jnp.array([2.0, 1.0]).reshape(1, 2, 1, 1), jnp.array([3.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> print(channel_kernel(a, g, scale_and_shift=True))
    [[45.  9.]
     [ 9.  2.]]
    """
    g = jnp.moveaxis(g, 0, 2)
    # sum_t g a, [copies, N, K, q]
    gradients = jnp.sum(g * a[:, :, None], 3)
    if scale_and_shift:
        # and sum_t g behind it, [copies, N, K, 2 q]
        of_shift = jnp.sum(g, 3)
        gradients = jnp.concatenate([gradients, of_shift], -1)
    return _by_gradients(jnp.moveaxis(gradients, 0, 2))


def _by_products(of_inputs: jax.Array, g: jax.Array) -> jax.Array:
    """`of_inputs [copies, N, T, N, T]`, `g [copies, N, K, T, q]`, one copy after another."""
    n, k = g.shape[1:3]
    # one copy at a time: products of all steps with all steps are the largest array here
    total = jnp.zeros((n, k, n, k), g.dtype)
    for inputs, mine in zip(of_inputs, g, strict=True):
        # g_kbt^T g_lcs for examples b, c, pullbacks k, l and steps t, s
        of_outputs = _einsum("bktq,clsq->bktcls", mine, mine)
        of_copy = _einsum("btcs,bktcls->bkcl", inputs, of_outputs)
        total = total + of_copy
    return total.reshape(n * k, n * k)


def _by_gradients(gradients: jax.Array) -> jax.Array:
    """`gradients [N, K, ...]`."""
    n, k = gradients.shape[:2]
    flat = gradients.reshape(n * k, -1)
    return jnp.matmul(flat, flat.T, precision=_EXACT)
