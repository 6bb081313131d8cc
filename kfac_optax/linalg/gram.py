"""Second-moment products over rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._layout import as_replicated, replicated

__all__ = ["as_replicated", "gram", "homogeneous", "replicated"]


def gram(
    x: Float[Array, "*rows p"],
    y: Float[Array, "*rows q"],
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, "p q"]:
    """`sum_rows x y^T` over all leading axes, without flattening them.

    >>> print(gram(jnp.ones((3, 2, 1)), jnp.ones((3, 2, 2))))
    [[6. 6.]]
    """
    # contracts examples, positions and steps at once; the feature axes stay: [p, q]
    leading = tuple(range(x.ndim - 1))
    contracted, batched = (leading, leading), ((), ())
    return jax.lax.dot_general(
        x,
        y,
        (contracted, batched),
        precision=precision,
        out_sharding=replicated(x),
    )


def homogeneous(a: Float[Array, "*rows d"]) -> Float[Array, "*rows d+1"]:
    """Rows with the trailing 1 of a layer with bias."""
    # the bias is the weight of a constant input
    ones = jnp.ones_like(a[..., :1])
    return jnp.concatenate([a, ones], axis=-1)
