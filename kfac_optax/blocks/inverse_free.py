"""Kronecker block whose inverse factors are followed by products alone: INGD, SINGD and IKFAC."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Average, Block, Layer, Numeric, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.kronecker import SHARING
from kfac_optax.linalg.gram import homogeneous
from kfac_optax.linalg.groups import group_gram, group_identity, group_product
from kfac_optax.linalg.root_structures import STRUCTURES, Structure, structure_of
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.weighted_rows import keep_rows


class Means(NamedTuple):
    """Mean eigenvalues of both factors, or what a batch says of them in the basis of the roots."""

    inputs: Array
    outputs: Array


class Root(NamedTuple):
    """`K`, with `K K^T ~ A^{-1}`, and the momentum of its logarithm, both in a structure."""

    root: Array
    momentum: Array


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

    def measure(a: Array, g: Array | None, use: Use, roots: Roots) -> tuple[Means, Means]:
        a, g = _rows(a, g, use)
        p, q = shape
        means = Means(_square(a, use) / use.examples / p, jnp.sum(g * g) / use.rows / q)
        moved = [
            _moments(form, x, held.root, weights, precision)
            for x, held, weights in zip((a, g), roots, (use.weights, None), strict=True)
        ]
        return means, Means(moved[0] / use.examples, moved[1] / use.rows)

    def factorize(means: Means, damping: Array) -> Roots:
        made = []
        for mean, shift, d in zip(means, tikhonov_shifts(*means, damping), shape, strict=True):
            identity = group_identity(d, form.width(d), mean.dtype)
            root = form.compress(identity / jnp.sqrt(mean + shift))
            made.append(Root(root, jnp.zeros_like(root)))
        return Roots(*made)

    def refresh(roots: Roots, means: Means, damping: Array, count: Array) -> Roots:
        return roots  # statistics have moved them already

    def absorb(roots: Roots, new: Means, means: Means, damping: Array, average: Average) -> Roots:
        def scales(held: Root, h: Array, d: int) -> tuple[Array | float, Array | float]:
            if not coupled:
                return 1.0, 1.0
            return _trace(form.expand(h)) / d, jnp.sum(form.expand(held.root) ** 2) / d

        of_inputs, of_outputs = map(scales, roots, new, shape)
        sides = zip(roots, new, (of_outputs, of_inputs), shape, strict=True)
        return Roots(*(move(held, h, other, damping, d) for held, h, other, d in sides))

    def move(held: Root, h: Array, other: tuple, damping: Array, d: int) -> Root:
        curvature, length = other
        k = form.expand(held.root)
        square = jnp.matmul(k.mT, k, precision=precision)
        identity = group_identity(d, form.width(d), k.dtype)
        force = curvature * h + form.tangent(damping * length * square - identity)
        momentum = root_momentum * held.momentum + force / 2
        m = form.expand(momentum)
        beta = root_rate / jnp.maximum(1, 2 * root_rate * _spectral_bound(m))
        moved = k - beta * jnp.matmul(k, m, precision=precision)
        dtype = held.root.dtype  # injected numbers may be wider
        return Root(form.compress(moved).astype(dtype), momentum.astype(dtype))

    def solve(roots: Roots, v: Array, damping: Array) -> Array:
        left, right = (form.expand(held.root) for held in roots)
        half = group_product(v, right, precision=precision)
        v = group_product(half, right.mT, precision=precision)
        half = group_product(v.T, left, precision=precision)
        return group_product(half, left.mT, precision=precision).T

    return Block(
        f"inverse-free ({structure if structure != 'block' else f'blocks of {size}'})",
        init,
        measure,
        factorize,
        solve,
        _no_product,
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


def _rows(a: Array, g: Array | None, use: Use) -> tuple[Array, Array]:
    if g is None:
        raise ValueError(
            "inverse_free: needs output gradients, but this estimator measures inputs only. Use "
            "fisher, ggn or empirical_fisher, or another block (kronecker)."
        )
    a = a.astype(use.dtype)
    a = homogeneous(a) if use.bias else a
    return keep_rows(a, use.weights), g.astype(use.dtype)


def _square(a: Array, use: Use) -> Array:
    """`sum_rows w |a|^2`."""
    lengths = jnp.sum(a * a, -1)
    return jnp.sum(lengths if use.weights is None else use.weights.astype(use.dtype) * lengths)


def _moments(
    form: Structure, x: Array, root: Array, weights: Array | None, precision: Any
) -> Array:
    """`P[sum_rows w (K^T x) (K^T x)^T]`, of blocks alone where the structure has some."""
    rotated = group_product(x, form.expand(root), precision=precision)
    size = form.width(x.shape[-1])
    return form.tangent(group_gram(rotated, size, weights, precision=precision))


def _trace(blocks: Float[Array, "m s s"]) -> Array:
    return jnp.einsum("mii->", blocks)


def _spectral_bound(blocks: Float[Array, "m s s"]) -> Array:
    """No less than the spectral norm: the geometric mean of the largest sums of rows and columns."""
    rows, columns = (jnp.max(jnp.sum(jnp.abs(blocks), axis)) for axis in (-1, -2))
    return jnp.sqrt(rows * columns)


def _no_product(means: Means, v: Array) -> Array:
    raise ValueError(
        "inverse_free: no average of the factors is kept to multiply with. Ask the exact curvature "
        "instead (a trust region in the exact metric), or take kfac."
    )
