"""Rows of one use of a layer, as Kronecker factors are made of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Use
from kfac_optax.linalg.gram import homogeneous
from kfac_optax.linalg.weighted_rows import count_rows


def input_rows(a: Float[Array, "*rows d"], use: Use) -> Float[Array, "*rows p"]:
    """Inputs in the dtype of the statistics, with the bias coordinate where the layer has a bias.

    >>> from kfac_optax.testing import dense_layer
    >>> use = Use(dense_layer(1, 1, bias=True), 1, 1, jnp.float32)
    >>> print(input_rows(jnp.array([[2.0]]), use))
    [[2. 1.]]
    """
    a = a.astype(use.dtype)
    return homogeneous(a) if use.bias else a


def share_of_layer(rows: Float[Array, "*rows d"], use: Use) -> Float[Array, ""]:
    """The part of a layer's rows that belongs to this use.

    Without output gradients `G := I` is shared out by it over the uses, which are added up.

    >>> from kfac_optax.testing import dense_layer
    >>> use = Use(dense_layer(1, 1), 2, 4, jnp.float32)
    >>> print(share_of_layer(jnp.ones((2, 1)), use))
    0.5
    """
    # weighted where rows count differently
    share = count_rows(rows, use.weights) / use.rows
    return jnp.asarray(share, use.dtype)
