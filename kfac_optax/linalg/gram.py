"""Second-moment products over rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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


def replicated(x: Array, ndim: int = 2) -> jax.sharding.NamedSharding | None:
    """Where mesh axes are explicit, a contraction over a sharded batch has to name its result's
    sharding.
    """
    sharding = jax.typeof(x).sharding
    # one device, or mesh axes that the compiler handles itself
    if all(part is None for part in sharding.spec):
        return None
    spec = jax.sharding.PartitionSpec(*[None] * ndim)
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def as_replicated(x: Array) -> Array:
    """`x` on all devices, where mesh axes are explicit; itself everywhere else."""
    sharding = replicated(x, x.ndim)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def homogeneous(a: Float[Array, "*rows d"]) -> Float[Array, "*rows d+1"]:
    """Rows with the trailing 1 of a layer with bias."""
    # the bias is the weight of a constant input
    ones = jnp.ones_like(a[..., :1])
    return jnp.concatenate([a, ones], axis=-1)
