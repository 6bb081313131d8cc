"""What tables looked up by tokens have in common: counts, output moments, checks."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kfac_optax._types import Use
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.weighted_rows import index_counts

INVERSES = ("eigh", "cholesky")


def token_counts(tokens: Int[Array, "*rows"], use: Use) -> Float[Array, " p"]:
    """`(1/N) sum_rows w e_token`, how often every token occurs in an example."""
    counts = index_counts(tokens, use.inputs, use.weights, use.dtype)
    return counts / use.examples


def output_moment(
    tokens: Int[Array, "*rows"],
    g: Float[Array, "*rows q"] | None,
    use: Use,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "q q"]:
    """`(1/rows) sum_rows g g^T`."""
    if g is None:  # forward only: G := I, shared out over the uses, which are added up
        share = math.prod(tokens.shape) / use.rows
        return share * jnp.eye(use.outputs, dtype=use.dtype)
    # the root of the weight is inside g
    g = g.astype(use.dtype)
    return gram(g, g, precision=precision) / use.rows


def check_lookup(where: str, a: Array, use: Use) -> None:
    """Raises unless a use is a look-up by integer tokens in a table without bias."""
    if not jnp.issubdtype(a.dtype, jnp.integer):
        raise ValueError(
            f"{where}: measure got inputs of dtype {a.dtype}; expected integer tokens. Use "
            "kronecker() for a dense layer."
        )
    check_no_bias(where, use)


def check_no_bias(where: str, use: Use) -> None:
    """Raises where a table has a bias."""
    # one row of the matrix for every token: a bias has none
    if use.bias:
        raise ValueError(
            f"{where}: the layer has a bias; expected a table only. Leave the bias to a block of "
            "its own."
        )
