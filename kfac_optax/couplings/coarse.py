"""Two-level K-FAC's coarse correction: one degree of freedom per layer that sees cross-layer
curvature.

`Z` sums all entries of a layer's gradient, so the coarse Fisher is `Z F Z^T` with one row per
layer. Tselepidis, Kohler & Orvieto, Two-Level K-FAC Preconditioning for Deep Learning (2020),
section 3 and algorithm 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kfac_optax._types import Coupling, Fine, Layer, Numeric, PyTree, System, Vector
from kfac_optax._validate import check_choice, check_number
from kfac_optax.linalg.factorize import Eigen, damped_quotient, psd_eigh
from kfac_optax.linalg.gram import replicated
from kfac_optax.linalg.weighted_rows import finite_padding

COARSE = ("factored", "exact")
COARSE_DAMPING = ("identity", "galerkin")
Resample = Callable[[jax.Array, int, int], jax.Array]  # (x, axis, smaller size)


class Grams(NamedTuple):
    """Entry sums of all cross factors: `inputs[i, j] = sum(A_ij)`, `outputs[i, j] = sum(G_ij)`,
    both `[L, L]`.
    """

    inputs: Float[Array, "L L"]
    outputs: Float[Array, "L L"]


class Exact(NamedTuple):
    """`F_c = E[u u^T]`, `u_i` the sum of all entries of an example's gradient of layer i."""

    fisher: Float[Array, "L L"]


class _Sums(NamedTuple):
    inputs: Float[Array, "copies N *positions"]
    outputs: Float[Array, "copies N *positions"]


def coarse_correction(
    coarse: str = "factored",
    *,
    damping: str = "identity",
    resample: str = "nearest",
    fine_weight: Numeric = 1.0,
    coarse_weight: Numeric = 1.0,
    precision: jax.lax.PrecisionLike = "highest",
) -> Coupling:
    """Additive coarse correction `fine_weight * (fine part) + coarse_weight * Z^T (F_c +
    damping)^{-1} Z V`.

    - `"factored"` (the paper): `F_c[i, j] = sum(A_ij) sum(G_ij)`, the sum of all entries of
      `A_ij (x) G_ij`. With the channel sums `alpha_i = 1^T a_i`, `gamma_i = 1^T g_i` of each
      example both are `L x L` Gram matrices, so no cross-covariance is ever formed. Layers with
      maps of different shapes are compared after bringing both to the smaller size, axis by axis.
      Since that is done pair by pair, the matrix may be slightly indefinite; negative eigenvalues
      are clamped before damping.
    - `"exact"`: `F_c = E[u u^T]` with `u_i = sum_t alpha_it gamma_it`: no independence assumption,
      no resampling.

    Layers that only scale and shift, and parameters on their own, have no row; every group of a
    grouped convolution and every layer of a stack has one.

    Args:
      coarse: `"factored"` or `"exact"`.
      damping: `"identity"` adds `lambda` to the diagonal (the paper), `"galerkin"` `lambda * n_i`
        with `n_i` the number of parameters of layer i, which is what restricting `F + lambda I`
        gives.
      resample: how `"factored"` makes the larger map smaller, `"nearest"` (the paper) or `"area"`
        (means).
      fine_weight: weight of the block-diagonal part.
      coarse_weight: weight of the correction.
      precision: matmul precision of the Grams.

    Returns:
      A `Coupling`.

    Raises:
      ValueError: unknown mode, negative weight.

    >>> print(coarse_correction("exact").name)
    coarse (exact, identity)

    Reference: Tselepidis, Kohler & Orvieto (2020), equations (5) to (7); damping in appendix A.
    """
    where = "coarse_correction"
    check_choice(where, "coarse", coarse, COARSE)
    check_choice(where, "coarse_damping", damping, COARSE_DAMPING)
    check_choice(where, "resample", resample, RESAMPLE)
    check_number(where, "fine_weight", fine_weight, at_least=0)
    check_number(where, "coarse_weight", coarse_weight, at_least=0)
    galerkin, select = damping == "galerkin", RESAMPLE[resample]

    def init(layers: Sequence[Layer], dtype: jnp.dtype) -> PyTree:
        # before the first statistic the coarse level corrects nothing
        zeros = jnp.zeros((sum(layer.copies for layer in layers),) * 2, dtype)
        return Grams(zeros, jnp.zeros_like(zeros)) if coarse == "factored" else Exact(zeros)

    def measure(alpha: Array, gamma: Array | None, weights: Array | None) -> PyTree:
        if gamma is None:
            raise ValueError(
                f"{where}: this estimator measures no output gradients, which the coarse matrix "
                "needs. Use fisher, ggn or empirical_fisher with kfac_two_level."
            )
        # padding may hold anything, in the sums of its rows too
        if weights is not None:
            alpha, gamma = finite_padding(alpha, weights), finite_padding(gamma, weights)
        # gamma carries the root of the weight, which is what one row of u u^T needs
        if coarse == "exact":
            # u_i = sum_t alpha_it gamma_it, [copies, N]
            return jnp.sum(alpha * gamma, tuple(range(2, alpha.ndim)))
        return _Sums(
            alpha if weights is None else alpha * jnp.sqrt(weights).astype(alpha.dtype), gamma
        )

    def reduce(measured: Sequence[PyTree], examples: int) -> PyTree:
        # rows of all layers one after another: u [L, N]
        if coarse == "exact":
            u = jnp.concatenate(measured)
            return Exact(_product(u, u, precision) / examples)
        return _grams(measured, examples, select, precision)

    def factorize(statistic: PyTree, fine: Fine) -> Eigen:
        return coarse_factorize(coarse_matrix(statistic), fine.sizes, galerkin=galerkin)

    def apply(inverse: Eigen, system: System) -> list[Vector]:
        # r = Z V, one number for each row
        restricted = system.restrict(system.gradient)
        correction = coarse_solve(
            inverse,
            restricted,
            system.damping,
            system.sizes,
            galerkin=galerkin,
            precision=precision,
        )
        # coarse_weight Z^T (F_c + damping)^{-1} r beside the weighted fine part
        shift = jnp.asarray(coarse_weight, correction.dtype) * correction
        fine = [jnp.asarray(fine_weight, u.dtype) * u for u in system.fine(system.gradient)]
        return [fine, system.prolong(shift)]

    name = f"coarse ({coarse}, {damping})"
    return Coupling(name, init, measure, reduce, factorize, apply, late=coarse == "factored")


def coarse_matrix(statistic: Grams | Exact) -> Float[Array, "L L"]:
    """The coarse Fisher `F_c` of a statistic.

    >>> print(coarse_matrix(Grams(2 * jnp.eye(2), jnp.ones((2, 2)))))
    [[2. 0.]
     [0. 2.]]
    """
    return (
        statistic.inputs * statistic.outputs if isinstance(statistic, Grams) else statistic.fisher
    )


def coarse_factorize(
    matrix: Float[Array, "L L"], sizes: Float[Array, " L"], *, galerkin: bool = False
) -> Eigen:
    """Eigendecomposition of `F_c`, negative eigenvalues clamped; of `F_c[i, j] / sqrt(n_i n_j)` for
    Galerkin damping.
    """
    return psd_eigh(matrix / jnp.sqrt(sizes[:, None] * sizes) if galerkin else matrix)


def coarse_solve(
    inverse: Eigen,
    restricted: Float[Array, " L"],
    damping: Float[Array, ""],
    sizes: Float[Array, " L"],
    *,
    galerkin: bool = False,
    precision: jax.lax.PrecisionLike = "highest",
) -> Float[Array, " L"]:
    """`(F_c + damping I)^{-1} r`, or `(F_c + damping diag(n))^{-1} r` with Galerkin damping.

    What is singular to working precision gets no correction (the pseudo-inverse), see
    `damped_quotient`.

    Args:
      inverse: from `coarse_factorize`.
      restricted: `r = Z V`.
      damping: added to the eigenvalues.
      sizes: parameters `n` of each row.
      galerkin: as for `coarse_factorize`.
      precision: matmul precision.

    >>> inverse = coarse_factorize(3 * jnp.eye(2), jnp.ones(2))
    >>> print(coarse_solve(inverse, jnp.array([4.0, 8.0]), jnp.float32(1.0), jnp.ones(2)))
    [1. 2.]
    """
    # with D = diag(sqrt(n)): (F_c + damping D^2)^{-1} = D^{-1} (D^{-1} F_c D^{-1} + damping I)^{-1}
    # D^{-1}
    scale = jnp.sqrt(sizes) if galerkin else jnp.ones_like(sizes)
    rotated = jnp.matmul(inverse.vectors.T, restricted / scale, precision=precision)
    rotated = damped_quotient(rotated, inverse.values, damping)
    return jnp.matmul(inverse.vectors, rotated, precision=precision) / scale


def _grams(
    measured: Sequence[_Sums],
    examples: int,
    select: Resample,
    precision: jax.lax.PrecisionLike,
) -> Grams:
    """Both Grams, block by block for layers with different maps of positions."""
    # layers by the shape of their maps: those of one group need no resampling
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, sums in enumerate(measured):
        groups.setdefault(sums.inputs.shape[2:], []).append(i)
    stacks = {
        shape: _Sums(*map(jnp.concatenate, zip(*(measured[i] for i in members), strict=True)))
        for shape, members in groups.items()
    }
    rows_in, rows_out = [], []
    # block rows of both Grams, one for each group
    for left in stacks.values():
        blocks = [_cross(left, right, examples, select, precision) for right in stacks.values()]
        rows_in.append(jnp.concatenate([b.inputs for b in blocks], 1))
        rows_out.append(jnp.concatenate([b.outputs for b in blocks], 1))
    # back from the order of the groups to that of execution
    order = _order(measured, groups)
    if order is None:
        return Grams(jnp.concatenate(rows_in), jnp.concatenate(rows_out))
    take = jnp.asarray(order)
    return Grams(jnp.concatenate(rows_in)[take][:, take], jnp.concatenate(rows_out)[take][:, take])


def _cross(
    left: _Sums,
    right: _Sums,
    examples: int,
    select: Resample,
    precision: jax.lax.PrecisionLike,
) -> Grams:
    """Positions are summed in the input side and averaged in the output side, as in the factors
    themselves.
    """
    left, right = common_positions(left, right, select)
    # A sums over positions, G averages over them: as in `kronecker`
    positions = math.prod(left.inputs.shape[2:])
    inputs = _product(left.inputs, right.inputs, precision) / examples
    return Grams(inputs, _product(left.outputs, right.outputs, precision) / (examples * positions))


def common_positions(left: _Sums, right: _Sums, select: Resample) -> tuple[_Sums, _Sums]:
    """Both on maps of one shape: axis by axis the smaller size, on one axis where they differ in
    number.
    """
    if left.inputs.ndim != right.inputs.ndim:
        left, right = (
            _Sums(*(x.reshape(*x.shape[:2], -1) for x in sums)) for sums in (left, right)
        )
    # axis 0 is the copies, axis 1 the examples
    for axis in range(2, left.inputs.ndim):
        size = min(left.inputs.shape[axis], right.inputs.shape[axis])
        left, right = (_Sums(*(select(x, axis, size) for x in sums)) for sums in (left, right))
    return left, right


def _nearest(x: Array, axis: int, size: int) -> Array:
    have = x.shape[axis]
    if have == size:
        return x
    return jnp.take(x, np.arange(size) * have // size, axis=axis)


def _area(x: Array, axis: int, size: int) -> Array:
    """Means over the cells that each of `size` equal parts touches."""
    have = x.shape[axis]
    if have == size:
        return x
    # column i averages over the cells that overlap the i-th of `size` equal parts
    cells = np.zeros((have, size))
    for i in range(size):
        first, last = i * have // size, -(-(i + 1) * have // size)
        cells[first:last, i] = 1 / (last - first)
    moved = jnp.matmul(jnp.moveaxis(x, axis, -1), jnp.asarray(cells, x.dtype), precision="highest")
    return jnp.moveaxis(moved, -1, axis)


RESAMPLE: dict[str, Resample] = {"nearest": _nearest, "area": _area}


def _product(x: Array, y: Array, precision: jax.lax.PrecisionLike) -> Array:
    """`sum over all but the first axis of x_i y_j`."""
    axes = tuple(range(1, x.ndim))
    return jax.lax.dot_general(
        x, y, ((axes, axes), ((), ())), precision=precision, out_sharding=replicated(x)
    )


def _order(measured: Sequence[_Sums], groups: dict[tuple[int, ...], list[int]]) -> list[int] | None:
    """Where each layer's rows are once layers have been grouped; `None` if the order did not
    change.
    """
    copies = [sums.inputs.shape[0] for sums in measured]
    grouped = [i for members in groups.values() for i in members]
    starts, position = {}, 0
    # where the copies of a layer begin in the grouped order
    for i in grouped:
        starts[i] = position
        position += copies[i]
    order = [starts[i] + c for i in range(len(measured)) for c in range(copies[i])]
    return None if order == sorted(order) else order
