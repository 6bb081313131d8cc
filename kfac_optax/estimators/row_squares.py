"""The diagonal of the curvature matrix, from the rows of layers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import make_buckets, scatter
from kfac_optax._types import Layer
from kfac_optax.estimators.layer_rows import LayerRows
from kfac_optax.linalg.example_moments import example_moments


def mean_squares(
    rows: Mapping[Layer, LayerRows], leaves: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """`(1/N) sum_b sum_k J_bk^2`, entry by entry, of all parameters of these layers, by name.

    Of an `empirical_fisher` that is the mean square of the examples' gradients. Positions and uses
    are added up within an example before squaring.

    Args:
      rows: from `curvature.rows(layers)`.
      leaves: parameters by name, for their shapes.

    >>> from kfac_optax._types import Layout
    >>> layer = Layer("w", "dense", "w", None, 1, 1, Layout((1, 1), (1, 1), (0, 1)))
    >>> a, g = jnp.array([[[[1.0]], [[2.0]]]]), jnp.array([[[[[3.0]], [[1.0]]]]])
    >>> print(mean_squares({layer: LayerRows(a, g)}, {"w": jnp.zeros((1, 1))})["w"])
    [[6.5]]
    """
    out: dict[str, jax.Array] = {}
    # layers may be parts of one leaf, whose other numbers have no derivative
    zeros = {name: jnp.zeros_like(x) for name, x in leaves.items()}
    for layer, (a, g) in rows.items():
        total = jax.vmap(lambda g, a=a, layer=layer: _squares(layer, a, g))(g).sum(0)
        (bucket,) = make_buckets([layer])
        out |= scatter(bucket, total / a.shape[1], zeros | out)
    return out


def _squares(layer: Layer, a: jax.Array, g: jax.Array) -> jax.Array:
    """`[copies, p, q]`, summed over examples, from `g [copies, N, T, q]` of one column."""
    if layer.kind == "embedding":
        return jax.vmap(lambda a, g: _of_table(a, g, layer.inputs))(a, g)
    if layer.kind == "scale_shift":
        parts = [a * g] if layer.bias is None else [a * g, g]
        return jnp.stack([jnp.square(x.sum(2)).sum(1) for x in parts], axis=1)
    return jax.vmap(example_moments)(a.astype(g.dtype), g)


def _of_table(tokens: jax.Array, g: jax.Array, size: int) -> jax.Array:
    """Squares of what every example adds to each row of a table, from `tokens [N, T]`.

    `(sum_t g_t)^2 = sum_t g_t sum_s g_s` over the positions of one token: no table for an example.
    """
    same = (tokens[:, :, None] == tokens[:, None, :]).astype(g.dtype)
    of_token = jnp.matmul(same, g, precision=jax.lax.Precision.HIGHEST)
    products = (g * of_token).reshape(-1, g.shape[-1])
    empty: Any = jnp.zeros((size, g.shape[-1]), g.dtype)
    # tokens below the table count nowhere, as in their gradient
    places = jnp.where(tokens < 0, size, tokens).ravel()
    return empty.at[places].add(products, mode="drop")
