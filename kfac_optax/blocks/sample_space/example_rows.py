"""Examples of a batch as rows `u_b = vec(a_b g_b^T)`, and the choice of some of them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.blocks.batch_rows import Columns
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import psd_inverse, symmetrize
from kfac_optax.linalg.gram import as_replicated
from kfac_optax.linalg.interpolative import interpolate, middle_of_interpolation


class ExampleRows(NamedTuple):
    """Rows `U` with `U^T U` the Fisher matrix, never formed, and `K = U U^T`."""

    inputs: Float[Array, "n p"]
    outputs: Float[Array, "n q"]
    gram: Float[Array, "n n"]


class Chosen(NamedTuple):
    """Some rows, and `C` for them."""

    inputs: Float[Array, "r p"]
    outputs: Float[Array, "r q"]
    middle: Float[Array, "r r"]


def example_rows(columns: Columns, *, precision: jax.lax.PrecisionLike) -> ExampleRows:
    """Rows of all pullbacks, of one row `a / sqrt(N)`, `g / sqrt(N)` for every example."""
    a, g = jax.tree.map(as_replicated, columns)
    pullbacks, examples, _ = g.shape
    # both were divided by the root of N, which their product is to be divided by once
    # [k, N, q] -> [k N, q], a row for every example and pullback
    g = g * math.sqrt(examples / pullbacks)
    g = g.reshape(-1, g.shape[-1])
    repeated = jnp.broadcast_to(a[0], (pullbacks, *a.shape[1:]))
    a = repeated.reshape(-1, a.shape[-1])
    # <vec(a g^T), vec(b h^T)> = (a^T b) (g^T h)
    of_inputs = jnp.matmul(a, a.T, precision=precision)
    of_outputs = jnp.matmul(g, g.T, precision=precision)
    return ExampleRows(a, g, symmetrize(of_inputs * of_outputs))


def all_of_them(rows: ExampleRows, shift: Array, rank: int) -> Chosen:
    """As they are, zeros behind them: `C = (K + shift I)^{-1}`."""
    # the state has room for `rank` rows, whatever the batch
    behind = (0, rank - len(rows.gram))
    inputs = jnp.pad(rows.inputs, (behind, (0, 0)))
    outputs = jnp.pad(rows.outputs, (behind, (0, 0)))
    middle = psd_inverse(rows.gram, shift)
    return Chosen(inputs, outputs, jnp.pad(middle, (behind, behind)))


def by_interpolation(rows: ExampleRows, shift: Array, rank: int) -> Chosen:
    """Those that the others are best written in."""
    found = interpolate(rows.gram, rank)
    middle = middle_of_interpolation(rows.gram, found, shift)
    inputs, outputs = rows.inputs[found.rows], rows.outputs[found.rows]
    return Chosen(inputs, outputs, middle)


def by_sampling(
    rows: ExampleRows,
    shift: Array,
    rank: int,
    key: Array,
) -> Chosen:
    """Drawn in proportion to their squared lengths, with replacement, and scaled to make up for
    the others.
    """
    # |u_b|^2
    lengths = jnp.diagonal(rows.gram)
    total = jnp.sum(lengths)
    # all alike where nothing was measured
    examples = len(lengths)
    share = jnp.where(total > 0, lengths / positive_or_one(total), 1 / examples)
    drawn = jax.random.choice(key, examples, (rank,), p=share)
    # E[sum_drawn u u^T / (rank share)] = sum_b u_b u_b^T
    factor = jax.lax.rsqrt(rank * share[drawn])
    among_drawn = rows.gram[drawn][:, drawn]
    gram = factor[:, None] * among_drawn * factor
    outputs = factor[:, None] * rows.outputs[drawn]
    return Chosen(rows.inputs[drawn], outputs, psd_inverse(gram, shift))
