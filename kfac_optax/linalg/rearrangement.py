"""Products with the rearranged Fisher block of a layer, `sum_b vec(a a^T) vec(g g^T)^T` for one row
per example, which is never formed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.linalg.batch_parts import count_parts, sum_of_parts
from kfac_optax.linalg.example_moments import ENTRIES
from kfac_optax.linalg.gram import gram


def contract(
    a: Float[Array, "n *rows p"],
    g: Float[Array, "n *rows q"],
    middle: Float[Array, "q q"] | None = None,
    *,
    precision: jax.lax.PrecisionLike = "highest",
    entries: int | None = None,
) -> Float[Array, "p p"]:
    """`sum_b D_b M D_b^T` with `D_b = sum_r a_br g_br^T` and `M` symmetric.

    With `F = sum_b vec(D_b) vec(D_b)^T`, this is the contraction of both output indices of `F` with
    `M`: the partial trace of `F` for `M = I`. With `a` and `g` changed over, and `M` of size
    `[p, p]`, it is that of both input indices. For one row per example it is
    `sum_b (g_b^T M g_b) a_b a_b^T`.

    Of several rows per example, either their products with each other or the `D_b` are formed,
    whatever costs less, for as many examples at a time as stay below `entries`.

    Args:
      a: left rows.
      g: right rows.
      middle: `M`; `None` for the identity.
      precision: of the matmuls.
      entries: how many entries of products exist at a time; `None` for `ENTRIES`.

    >>> a, g = jnp.array([[[1.0], [2.0]]]), jnp.array([[[3.0], [-1.0]]])
    >>> print(contract(a, g), contract(a[:, 0], g[:, 0]), contract(a, g, jnp.array([[2.0]])))
    [[1.]] [[9.]] [[2.]]
    """
    n, p = a.shape[0], a.shape[-1]
    q = g.shape[-1]
    # positions, patches and steps on one axis
    a = a.reshape(n, -1, p)
    g = g.reshape(n, -1, q)
    rows = a.shape[1]

    def times_middle(x: Array) -> Array:
        if middle is None:
            return x
        return jnp.matmul(x, middle, precision=precision)

    # sum_b (g^T M g) a a^T
    if rows == 1:
        products = times_middle(g) * g
        sizes = jnp.sum(products, -1, keepdims=True)
        return gram(sizes * a, a, precision=precision)

    # sum_rs (g_r^T M g_s) a_r a_s^T
    def of_pairs(a: Array, g: Array) -> Array:
        # [n, rows, rows]
        moved = times_middle(g)
        pairs = jnp.matmul(moved, g.mT, precision=precision)
        left = jnp.matmul(pairs, a, precision=precision)
        return gram(left, a, precision=precision)

    # D M D^T, with D formed
    def of_products(a: Array, g: Array) -> Array:
        # [n, p, q], and its rows in front of the contraction
        products = jnp.matmul(a.mT, g, precision=precision)
        moved = times_middle(products)
        return gram(moved.mT, products.mT, precision=precision)

    # multiplications for each example
    pairwise = rows * (p * p + q * q) + rows * rows * (p + q)
    whole = p * q * (rows + p + q)
    function, formed = of_products, p * q
    if pairwise < whole:
        function, formed = of_pairs, rows * rows
    least = -(-n * formed // (entries or ENTRIES))
    parts = count_parts(a, least)
    return sum_of_parts(function, parts, a, g)
