"""Coarse spaces of deflated couplings: vectors that the coarse level may combine, one or two a row.

A row is the matrix of one layer that couplings see. Each vector of a space lives on one row, so `Z`
is `[m, n]` with `m = k L` for `k` vectors a row, and vector `j L + i` is the j-th one of row `i`.
Koroko et al., Analysis and Comparison of Two-Level KFAC Methods for Training Deep Neural Networks
(2023), has spaces of these kinds.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, PyTree, System, Vector
from kfac_optax.blocks.embedding.embedding import TokenEigenInverse
from kfac_optax.blocks.kronecker.kronecker import EigenInverse
from kfac_optax.linalg.factorize import Eigen, psd_eigh

SPACES = ("sums", "updates", "residual", "krylov", "spectral")


class Space(NamedTuple):
    """Rows `z_1 .. z_m` of `Z`, orthogonal to one another.

    Attributes:
      restrict: `vector -> [m]`, `Z v`.
      prolong: `[m] -> vector`, `Z^T c`; zeros in layers that couplings do not see.
      squares: `[m]`, `||z_i||^2`, the diagonal of the Gram matrix `Z Z^T`, whose other entries are
        zero. Zero where a vector has been dropped.
    """

    restrict: Callable[[Vector], jax.Array]
    prolong: Callable[[jax.Array], Vector]
    squares: jax.Array


def make_space(
    word: str,
    system: System,
    left: Callable[[], Vector],
) -> Space:
    """The space of a word of `SPACES`.

    Args:
      word: see `deflated`.
      system: what is solved.
      left: `() -> g - F_lambda M^{-1} g`, what the block-diagonal level leaves; for `"residual"`.

    Returns:
      For `"sums"` vectors of ones, so that `squares` are the numbers of parameters. For the others
      unit vectors, `[L]` of them or `[2 L]`.

    Raises:
      ValueError: `"spectral"` where a layer holds no eigenvectors.
    """
    # vectors of ones: no basis has to be made
    if word == "sums":
        return Space(system.restrict, system.prolong, system.sizes)
    if word == "updates":
        return span(system, [system.fine(system.gradient)])
    if word == "residual":
        return span(system, [system.fine(left())])
    if word == "krylov":
        ones = system.prolong(jnp.ones_like(system.sizes))
        solved = system.fine(system.gradient)
        return span(system, [ones, solved])
    # eigenvectors of the last refresh, one matrix a row
    rows = range(len(system.sizes))
    vectors = [leading_vector(system.inverses(row)) for row in rows]
    return span(system, [system.replace(system.gradient, vectors)])


def span(system: System, columns: Sequence[Vector]) -> Space:
    """The space of all rows of the given vectors, in a basis that is orthonormal row by row.

    `Q = Z^T (Z F_lambda Z^T)^{-1} Z` depends on the span alone. In an orthonormal basis
    `Z F_lambda Z^T = Z F Z^T + lambda I`, where it would be `Z F Z^T + lambda Z Z^T` in any other,
    with entries off the diagonal for vectors of one row.

    Args:
      system: whose rows.
      columns: `k` vectors. What they hold in layers that couplings do not see is left out.

    Returns:
      A space of `k L` vectors.
    """
    rows = len(system.sizes)
    # ones where couplings look, zeros elsewhere
    seen = system.prolong(jnp.ones_like(system.sizes))
    inside = [_where_seen(seen, vector) for vector in columns]
    # vectors of one row share a bucket, in which all copies are treated at once
    buckets = zip(*inside, strict=True)
    by_bucket = [orthonormal(list(vectors)) for vectors in buckets]
    basis = [list(vector) for vector in zip(*by_bucket, strict=True)]

    # (z_j, v) of every row, the first vectors of all rows in front
    def restrict(vector: Vector) -> jax.Array:
        products = [_times(z, vector) for z in basis]
        return jnp.concatenate([system.restrict(product) for product in products])

    def prolong(values: jax.Array) -> Vector:
        # [k L] -> k vectors of [L] coefficients
        parts = values.reshape(len(basis), rows)
        terms = []
        for z, part in zip(basis, parts, strict=True):
            terms.append(_times(z, system.prolong(part)))
        buckets = zip(*terms, strict=True)
        return [sum(xs[1:], xs[0]) for xs in buckets]

    squares = [system.restrict(_times(z, z)) for z in basis]
    return Space(restrict, prolong, jnp.concatenate(squares))


def orthonormal(vectors: list[Float[Array, "copies p q"]]) -> list[Float[Array, "copies p q"]]:
    """Gram-Schmidt for the vectors of every copy, zeros in place of those that add no direction.

    A vector is dropped where it is zero, or where what is orthogonal to those before it has at most
    `sqrt(eps)` of its length (`eps` of the dtype): the rest is rounding for the greater part.

    >>> first, second = orthonormal([jnp.full((1, 1, 2), 3.0), jnp.array([[[1.0, 0.0]]])])
    >>> print(first.round(4), second.round(4))
    [[[0.7071 0.7071]]] [[[ 0.7071 -0.7071]]]
    >>> print(orthonormal([first, 2 * first])[1])
    [[[0. 0.]]]
    """
    basis: list[Array] = []
    for vector in vectors:
        # lengths compare with one
        rest = _unit(vector)
        for other in basis + basis:  # the second round takes what rounding left in the first
            rest = rest - _inner(other, rest) * other
        length = jnp.sqrt(_inner(rest, rest))
        rounding = jnp.sqrt(jnp.finfo(rest.dtype).eps)
        kept = ~(length <= rounding)  # NaN is kept, to be seen
        divisor = jnp.where(kept, length, 1)
        unit = rest / divisor
        basis.append(jnp.where(kept, unit, 0))
    return basis


def factorize_space(space: Space, form: Float[Array, "m m"]) -> Eigen:
    """Eigendecomposition of `Z F Z^T` for vectors of unit length, negative eigenvalues clamped."""
    # D^{-1} Z F Z^T D^{-1} with D the lengths of the vectors
    squares = _known(space.squares)
    scale = jnp.sqrt(squares[:, None] * squares)
    return psd_eigh(form / scale)


def solve_space(
    inverse: Eigen,
    space: Space,
    restricted: Float[Array, " m"],
    damping: Float[Array, ""],
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, " m"]:
    """`(Z F Z^T + damping Z Z^T)^+ r`, with `Z Z^T = diag(squares)`.

    A pseudo-inverse: of the eigenvalues for unit vectors, damping included, those of at most `eps`
    times the largest are left out (`eps` of the dtype). That is below what rounding leaves in the
    others; with damping it happens to dropped vectors at most, or where damping is that small.

    Args:
      inverse: from `factorize_space`.
      space: the same space.
      restricted: `r = Z v`.
      damping: added to the eigenvalues.
      precision: matmul precision.

    >>> space = Space(lambda v: v, lambda c: c, jnp.array([2.0, 0.0]))  # the second was dropped
    >>> inverse = factorize_space(space, jnp.diag(jnp.array([6.0, 0.0])))
    >>> print(solve_space(inverse, space, jnp.array([8.0, 0.0]), jnp.float32(1.0)))
    [1. 0.]
    """
    scale = jnp.sqrt(_known(space.squares))
    values = inverse.values + damping
    # as for unit vectors, so that the scale of Z does not matter
    eps = jnp.finfo(values.dtype).eps
    kept = values > eps * jnp.max(values)
    unit = restricted / scale
    rotated = jnp.matmul(inverse.vectors.T, unit, precision=precision)
    divisor = jnp.where(kept, values, 1)
    solved = jnp.where(kept, rotated / divisor, 0)
    weights = jnp.matmul(inverse.vectors, solved, precision=precision)
    return weights / scale


def leading_vector(inverse: PyTree) -> Float[Array, "p q"]:
    """`u_A u_G^T`, the eigenvector of `A (x) G` with the largest eigenvalue, as a matrix.

    Raises:
      ValueError: what is held has no eigenvectors of both factors.

    >>> last = Eigen(jnp.eye(2), jnp.array([1.0, 2.0]))  # eigenvalues ascend
    >>> print(leading_vector(EigenInverse(last, last)))
    [[0. 0.]
     [0. 1.]]
    """
    # eigenvalues rise: the last column of both factors
    if isinstance(inverse, EigenInverse):
        last_input = inverse.inputs.vectors[:, -1:]
        return last_input * inverse.outputs.vectors[:, -1]
    if isinstance(inverse, TokenEigenInverse):  # A is diagonal: its eigenvectors are the tokens
        counts = inverse.counts
        token = jnp.arange(len(counts)) == jnp.argmax(counts)
        unit = token[:, None].astype(counts.dtype)
        return unit * inverse.outputs.vectors[:, -1]
    raise ValueError(f"deflated: space='spectral' got {type(inverse).__name__}; {_EXPECTED}")


def check_eigenvectors(layers: Sequence[Layer], blocks: Sequence[Block]) -> None:
    """Every layer that a coupling sees holds the eigenvectors that `"spectral"` is made of.

    Raises:
      ValueError: one does not.
    """
    for layer, block in zip(layers, blocks, strict=True):
        if not layer.coupled:
            continue
        if not isinstance(_held(layer, block), EigenInverse | TokenEigenInverse):
            raise ValueError(
                f"deflated: space='spectral', but layer {layer.path!r} has the block "
                f"{block.name!r}, which holds no eigenvectors of its factors; {_EXPECTED}"
            )


_EXPECTED = (
    "expected kronecker('eigh'), or embedding('eigh') for an embedding. Use kfac(..., "
    "inverse='eigh'), or another space."
)


def _held(layer: Layer, block: Block) -> PyTree:
    # by shapes alone, nothing is computed
    def inverse() -> PyTree:
        statistic = block.init(layer, jnp.float32)
        return block.factorize(statistic, jnp.ones(()))

    return jax.eval_shape(inverse)


def _where_seen(seen: Vector, vector: Vector) -> Vector:
    pairs = zip(seen, vector, strict=True)
    return [jnp.where(ones != 0, x, 0) for ones, x in pairs]


def _times(left: Vector, right: Vector) -> Vector:
    return [x * y for x, y in zip(left, right, strict=True)]


def _inner(left: Array, right: Array) -> Array:
    return jnp.sum(left * right, (1, 2), keepdims=True)


def _unit(vector: Array) -> Array:
    """Of every copy, at unit length; its largest entry comes first, for squares would underflow."""
    largest = jnp.max(jnp.abs(vector), (1, 2), keepdims=True)
    scaled = vector / _known(largest)
    square = _inner(scaled, scaled)
    length = jnp.sqrt(_known(square))
    return scaled / length


def _known(sizes: Array) -> Array:
    """Sizes with one in place of zero, for vectors that have been dropped."""
    return jnp.where(sizes == 0, 1, sizes)
