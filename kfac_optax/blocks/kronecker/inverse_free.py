"""Kronecker block whose inverse factors are followed by products alone: INGD, SINGD and IKFAC."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kfac_optax._types import Average, Block, Layer, Numeric, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.kronecker.inverse_root import (
    Root,
    Scales,
    first_root,
    moved_root,
    root_force,
    root_moments,
    root_scales,
    times_square,
)
from kfac_optax.blocks.kronecker.kronecker import SHARING
from kfac_optax.blocks.refusals import given_outputs, without_product
from kfac_optax.linalg.gram import homogeneous
from kfac_optax.linalg.root_structures import STRUCTURES, structure_of
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.weighted_rows import keep_rows


class Means(NamedTuple):
    """Mean eigenvalues of both factors, or what a batch says of them in the basis of the roots."""

    inputs: Array
    outputs: Array


class Roots(NamedTuple):
    """Both factors of a layer, `K` and `C`."""

    inputs: Root
    outputs: Root


def inverse_free(
    shape: tuple[int, int],
    structure: str = "dense",
    *,
    size: int = 30,
    root_rate: Numeric = 1e-2,
    root_momentum: Numeric = 0.5,
    coupled: bool = True,
    sharing: str = "expand",
    positions: int | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Kronecker block that holds roots `K K^T ~ A^{-1}`, `C C^T ~ G^{-1}` and never inverts.

    Every statistic moves them, with `H_K = K^T A K` and `H_C = C^T G C` of its batch alone:

        m_K <- alpha m_K + P[tr(H_C)/q H_K + damping tr(C^T C)/q K^T K - I] / 2
        K   <- K (I - beta m_K)                         and likewise m_C, C, from the old K and C,

    `P` the projection on what the structure can move, `K (I - beta m)` the first order of
    `K exp(-beta m)`. The update is `K K^T V C C^T`. Without `coupled` the traces are 1 (IKFAC with
    `alpha = 0`): `(K K^T)^{-1}` is then, up to `beta^2`, the average
    `(1 - beta) S + beta (A + damping I)`. With them a factor `c` moved from one side to the other
    has no influence.

    Where `beta m` could be longer than 1/2 (by a bound on its spectral norm), `beta` is as much
    smaller, so that the roots stay invertible. They start at those of the damped identity.
    Structures are those of `structure_of`; of all but `"dense"` only the numbers in them are
    measured.

    Args:
      shape: `[p, q]` of the layers that get it.
      structure: `"dense"`, `"diagonal"`, `"block"`, `"triangular"` or `"toeplitz"`.
      size: coordinates in a block of `"block"`, at most.
      root_rate: beta, in (0, 1].
      root_momentum: alpha, in [0, 1).
      coupled: whether each side is scaled by the trace of the other.
      sharing: as in `kronecker`.
      positions: as in `kronecker`.
      precision: matmul precision of statistics, steps and solves.

    Returns:
      A `Block`.

    Raises:
      ValueError: an unknown word or a number out of range.

    >>> import kfac_optax as ko
    >>> block = inverse_free((2, 1))
    >>> means = block.init(ko.testing.dense_layer(2, 1), jnp.float32)
    >>> roots = block.factorize(means, jnp.float32(1.0))
    >>> [f"{u:.2f}" for u in block.solve(roots, jnp.ones((2, 1)), jnp.float32(1.0)).ravel()]
    ['0.25', '0.25']

    Reference: Lin, Duruisseaux, Leok, Nielsen, Khan & Schmidt, Simplifying Momentum-based
      Positive-definite Submanifold Optimization with Applications to Deep Learning (2023); Lin,
      Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner & Makhzani, Structured Inverse-Free Natural
      Gradient: Memory-Efficient & Numerically-Stable KFAC (2024).
    """
    _check(structure, size, root_rate, root_momentum, sharing, positions)
    form = structure_of(structure, size)

    def init(layer: Layer, dtype: jnp.dtype) -> Means:
        return Means(jnp.ones((), dtype), jnp.ones((), dtype))

    def measure(
        a: Array,
        g: Array | None,
        use: Use,
        roots: Roots,
    ) -> tuple[Means, Means]:
        a, g = _rows(a, g, use)
        p, q = shape
        # tr(A) / p and tr(G) / q, for the size of the first roots
        mean_a = _square(a, use) / use.examples / p
        mean_g = jnp.sum(g * g) / use.rows / q
        means = Means(mean_a, mean_g)
        # P[K^T A K] and P[C^T G C] of this batch
        of_inputs = root_moments(form, roots.inputs, a, use.weights, precision)
        of_outputs = root_moments(form, roots.outputs, g, None, precision)
        return means, Means(of_inputs / use.examples, of_outputs / use.rows)

    def factorize(means: Means, damping: Array) -> Roots:
        # K K^T = (A + pi sqrt(damping))^{-1} for a factor that is its mean eigenvalue times the
        # identity
        shifts = tikhonov_shifts(*means, damping)
        totals = (mean + shift for mean, shift in zip(means, shifts, strict=True))
        roots = (first_root(form, total, d) for total, d in zip(totals, shape, strict=True))
        return Roots(*roots)

    def refresh(
        roots: Roots,
        means: Means,
        damping: Array,
        count: Array,
    ) -> Roots:
        return roots  # statistics have moved them already

    def absorb(
        roots: Roots,
        new: Means,
        means: Means,
        damping: Array,
        average: Average,
    ) -> Roots:
        # both sides from the old roots
        of_inputs, of_outputs = map(scales, roots, new, shape)
        p, q = shape
        inputs = move(roots.inputs, new.inputs, of_outputs, damping, p)
        outputs = move(roots.outputs, new.outputs, of_inputs, damping, q)
        return Roots(inputs, outputs)

    def scales(held: Root, moments: Array, d: int) -> Scales:
        # tr(H_C) / q and tr(C^T C) / q for K, the same of K for C; one each for IKFAC
        return root_scales(form, held, moments, d) if coupled else Scales(1.0, 1.0)

    def move(
        held: Root,
        moments: Array,
        other: Scales,
        damping: Array,
        d: int,
    ) -> Root:
        force = root_force(form, held, moments, other, damping, d, precision)
        return moved_root(form, held, force, root_rate, root_momentum, precision)

    def solve(roots: Roots, v: Array, damping: Array) -> Array:
        # K K^T V C C^T, by rows of V first
        right = times_square(form, roots.outputs, v, precision)
        return times_square(form, roots.inputs, right.T, precision).T

    return Block(
        f"inverse-free ({structure if structure != 'block' else f'blocks of {size}'})",
        init,
        measure,
        factorize,
        solve,
        without_product("inverse_free"),
        sharing=sharing,
        positions=positions,
        refresh=refresh,
        absorb=absorb,
        absorbs="means",
        reads_inverse=True,
    )


def _check(
    structure: str,
    size: int,
    root_rate: Numeric,
    root_momentum: Numeric,
    sharing: str,
    positions: int | None,
) -> None:
    where = "inverse_free"
    check_choice(where, "structure", structure, STRUCTURES)
    check_choice(where, "sharing", sharing, SHARING)
    check_number(where, "size", size, at_least=1)
    check_number(where, "root_rate", root_rate, above=0, at_most=1)
    check_number(where, "root_momentum", root_momentum, at_least=0, at_most=0.999)
    if positions is not None:
        check_number(where, "positions", positions, at_least=1)


def _rows(
    a: Array,
    g: Array | None,
    use: Use,
) -> tuple[Array, Array]:
    g = given_outputs("inverse_free", g)
    # rows with the bias coordinate, those of weight zero never read
    a = a.astype(use.dtype)
    a = homogeneous(a) if use.bias else a
    return keep_rows(a, use.weights), g.astype(use.dtype)


def _square(a: Array, use: Use) -> Array:
    """`sum_rows w |a|^2`."""
    lengths = jnp.sum(a * a, -1)
    # weighted lengths, so that trace and factor agree
    if use.weights is not None:
        lengths = use.weights.astype(use.dtype) * lengths
    return jnp.sum(lengths)
