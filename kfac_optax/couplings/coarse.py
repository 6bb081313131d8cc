"""Two-level K-FAC's coarse correction: one degree of freedom per layer that sees cross-layer
curvature.

`Z` sums all entries of a layer's gradient, so the coarse Fisher is `Z F Z^T` with one row per
layer. Tselepidis, Kohler & Orvieto, Two-Level K-FAC Preconditioning for Deep Learning (2020),
section 3 and algorithm 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Coupling, Fine, Layer, Numeric, PyTree, System, Vector
from kfac_optax._validate import check_choice, check_number
from kfac_optax.couplings.grams import Grams, Sums, entry_products, grams_of
from kfac_optax.couplings.resampling import RESAMPLE
from kfac_optax.linalg.factorize import Eigen, damped_quotient, psd_eigh
from kfac_optax.linalg.weighted_rows import finite_padding

COARSE = ("factored", "exact")
COARSE_DAMPING = ("identity", "galerkin")


class Exact(NamedTuple):
    """`F_c = E[u u^T]`, `u_i` the sum of all entries of an example's gradient of layer i."""

    fisher: Float[Array, "L L"]


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
        rows = sum(layer.copies for layer in layers)
        zeros = jnp.zeros((rows, rows), dtype)
        if coarse == "exact":
            return Exact(zeros)
        return Grams(zeros, jnp.zeros_like(zeros))

    def measure(
        alpha: Array,
        gamma: Array | None,
        weights: Array | None,
    ) -> PyTree:
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
            positions = tuple(range(2, alpha.ndim))
            return jnp.sum(alpha * gamma, positions)
        if weights is not None:
            alpha = alpha * jnp.sqrt(weights).astype(alpha.dtype)
        return Sums(alpha, gamma)

    def reduce(measured: Sequence[PyTree], examples: int) -> PyTree:
        # rows of all layers one after another: u [L, N]
        if coarse == "exact":
            u = jnp.concatenate(measured)
            return Exact(entry_products(u, u, precision) / examples)
        return grams_of(measured, examples, select, precision)

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
        update = system.fine(system.gradient)
        fine = [jnp.asarray(fine_weight, u.dtype) * u for u in update]
        return [fine, system.prolong(shift)]

    return Coupling(
        f"coarse ({coarse}, {damping})",
        init,
        measure,
        reduce,
        factorize,
        apply,
        late=coarse == "factored",
    )


def coarse_matrix(statistic: Grams | Exact) -> Float[Array, "L L"]:
    """The coarse Fisher `F_c` of a statistic.

    >>> print(coarse_matrix(Grams(2 * jnp.eye(2), jnp.ones((2, 2)))))
    [[2. 0.]
     [0. 2.]]
    """
    if isinstance(statistic, Exact):
        return statistic.fisher
    return statistic.inputs * statistic.outputs


def coarse_factorize(
    matrix: Float[Array, "L L"],
    sizes: Float[Array, " L"],
    *,
    galerkin: bool = False,
) -> Eigen:
    """Eigendecomposition of `F_c`, negative eigenvalues clamped; of `F_c[i, j] / sqrt(n_i n_j)` for
    Galerkin damping.
    """
    if galerkin:
        matrix = matrix / jnp.sqrt(sizes[:, None] * sizes)
    return psd_eigh(matrix)


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
