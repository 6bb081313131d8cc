"""Two-level K-FAC's coarse correction: one degree of freedom per layer that sees cross-layer curvature.

`Z` sums all entries of a layer's gradient, so the coarse Fisher is `Z F Z^T` with one row per layer. Tselepidis,
Kohler & Orvieto, Two-Level K-FAC Preconditioning for Deep Learning (2020), section 3 and algorithm 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Coupling, Numeric, PyTree, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.linalg.factorize import Eigen, psd_eigh
from kfac_optax.linalg.gram import replicated

COARSE = ("factored", "exact")
COARSE_DAMPING = ("identity", "galerkin")


class Grams(NamedTuple):
    """Entry sums of all cross factors: `inputs[i, j] = sum(A_ij)`, `outputs[i, j] = sum(G_ij)`, both `[L, L]`."""

    inputs: Float[Array, "L L"]
    outputs: Float[Array, "L L"]


class Exact(NamedTuple):
    """`F_c = E[u u^T]`, `u_i` the sum of all entries of an example's gradient of layer i."""

    fisher: Float[Array, "L L"]


class _Sums(NamedTuple):
    inputs: Float[Array, "*copies N T"]
    outputs: Float[Array, "*copies N T"]


def coarse_correction(
    coarse: str = "factored",
    *,
    damping: str = "identity",
    fine_weight: Numeric = 1.0,
    coarse_weight: Numeric = 1.0,
    precision: jax.lax.PrecisionLike = "highest",
) -> Coupling:
    """Additive coarse correction `fine_weight * (fine part) + coarse_weight * Z^T (F_c + damping)^{-1} Z V`.

    - `"factored"` (the paper): `F_c[i, j] = sum(A_ij) sum(G_ij)`, the sum of all entries of `A_ij (x) G_ij`. With the
      channel sums `alpha_i = 1^T a_i`, `gamma_i = 1^T g_i` of each example both are `L x L` Gram matrices, so no
      cross-covariance is ever formed. Layers with different numbers of positions are compared after nearest-neighbour
      selection from the longer one.
    - `"exact"`: `F_c = E[u u^T]` with `u_i = sum_t alpha_it gamma_it`: no independence assumption, no resampling.

    Args:
      coarse: `"factored"` or `"exact"`.
      damping: `"identity"` adds `lambda` to the diagonal (the paper), `"galerkin"` `lambda * n_i` with `n_i` the
        number of parameters of layer i, which is what restricting `F + lambda I` gives.
      fine_weight: weight of the block-diagonal part.
      coarse_weight: weight of the correction.
      precision: matmul precision of the Grams.

    Returns:
      A `Coupling`.

    Raises:
      ValueError: unknown mode, negative weight.

    >>> coupling = coarse_correction("exact")
    >>> held = coupling.factorize(Exact(3 * jnp.eye(2)), jnp.ones(2))
    >>> print(coupling.solve(held, jnp.array([4.0, 8.0]), jnp.float32(1.0), jnp.ones(2)))
    [1. 2.]

    Reference: Tselepidis, Kohler & Orvieto (2020), equations (5) to (7); damping in appendix A.
    """
    where = "coarse_correction"
    check_choice(where, "coarse", coarse, COARSE)
    check_choice(where, "coarse_damping", damping, COARSE_DAMPING)
    check_number(where, "fine_weight", fine_weight, at_least=0)
    check_number(where, "coarse_weight", coarse_weight, at_least=0)
    galerkin = damping == "galerkin"

    def init(layers: int, dtype: jnp.dtype) -> PyTree:
        zeros = jnp.zeros((layers, layers), dtype)
        return Grams(zeros, zeros) if coarse == "factored" else Exact(zeros)

    def measure(a: Array, g: Array | None, use: Use) -> PyTree:
        if g is None:
            raise ValueError(
                f"{where}: this estimator measures no output gradients, which the coarse matrix needs. "
                "Use fisher, ggn or empirical_fisher with kfac_two_level."
            )
        alpha, gamma = _channel_sums(a, g, use)
        if coarse == "exact":  # gamma carries the root of the weight, which is what one row of u u^T needs
            return jnp.sum(alpha * gamma, -1)
        return _Sums(alpha if use.weights is None else alpha * _per_row(jnp.sqrt(use.weights), alpha), gamma)

    def reduce(measured: Sequence[PyTree], examples: int) -> PyTree:
        if coarse == "exact":
            u = jnp.concatenate(measured)
            return Exact(_product(u, u, precision) / examples)
        return _grams(measured, examples, precision)

    def factorize(statistic: PyTree, sizes: Array) -> Eigen:
        fisher = matrix(statistic)
        if galerkin:
            fisher = fisher / jnp.sqrt(sizes[:, None] * sizes)
        return psd_eigh(fisher)

    def solve(held: Eigen, restricted: Array, lam: Array, sizes: Array) -> Array:
        scale = jnp.sqrt(sizes) if galerkin else jnp.ones_like(sizes)
        rotated = jnp.matmul(held.vectors.T, restricted / scale, precision=precision) / (held.values + lam)
        return jnp.matmul(held.vectors, rotated, precision=precision) / scale

    def matrix(statistic: PyTree) -> Array:
        return statistic.inputs * statistic.outputs if coarse == "factored" else statistic.fisher

    name = f"coarse ({coarse}, {damping})"
    return Coupling(
        name, coarse == "factored", init, measure, reduce, factorize, solve, matrix, fine_weight, coarse_weight
    )


def _channel_sums(a: Array, g: Array, use: Use) -> _Sums:
    """`alpha` and `gamma` of one use, `[N, R]`; the bias coordinate counts as one more input."""
    alpha = jnp.sum(a, -1, dtype=use.dtype) + use.bias
    gamma = jnp.sum(g, -1, dtype=use.dtype)
    return _Sums(alpha.reshape(alpha.shape[0], -1), gamma.reshape(gamma.shape[0], -1))


def _per_row(weights: Array, like: Array) -> Array:
    return weights.reshape(like.shape).astype(like.dtype)


def _grams(measured: Sequence[_Sums], examples: int, precision: jax.lax.PrecisionLike) -> Grams:
    """Both Grams, block by block for layers with different numbers of positions."""
    groups: dict[int, list[int]] = {}
    for i, sums in enumerate(measured):
        groups.setdefault(sums.inputs.shape[-1], []).append(i)
    stacks = {
        t: _Sums(*map(jnp.concatenate, zip(*(measured[i] for i in members), strict=True)))
        for t, members in groups.items()
    }
    rows_in, rows_out = [], []
    for t, left in stacks.items():
        blocks = [_cross(left, right, min(t, u), examples, precision) for u, right in stacks.items()]
        rows_in.append(jnp.concatenate([b.inputs for b in blocks], 1))
        rows_out.append(jnp.concatenate([b.outputs for b in blocks], 1))
    order = _order(measured, groups)
    if order is None:
        return Grams(jnp.concatenate(rows_in), jnp.concatenate(rows_out))
    take = jnp.asarray(order)
    return Grams(jnp.concatenate(rows_in)[take][:, take], jnp.concatenate(rows_out)[take][:, take])


def _cross(left: _Sums, right: _Sums, positions: int, examples: int, precision: jax.lax.PrecisionLike) -> Grams:
    """Positions are summed in the input side and averaged in the output side, as in the factors themselves."""
    left, right = (_Sums(*(_nearest(x, positions) for x in sums)) for sums in (left, right))
    inputs = _product(left.inputs, right.inputs, precision) / examples
    return Grams(inputs, _product(left.outputs, right.outputs, precision) / (examples * positions))


def _product(x: Array, y: Array, precision: jax.lax.PrecisionLike) -> Array:
    """`sum over all but the first axis of x_i y_j`."""
    axes = tuple(range(1, x.ndim))
    return jax.lax.dot_general(x, y, ((axes, axes), ((), ())), precision=precision, out_sharding=replicated(x))


def _nearest(x: Array, positions: int) -> Array:
    have = x.shape[-1]
    if have == positions:
        return x
    return x[..., jnp.asarray([(i * have) // positions for i in range(positions)])]


def _order(measured: Sequence[_Sums], groups: dict[int, list[int]]) -> list[int] | None:
    """Where each layer's rows are once layers have been grouped; `None` if the order did not change."""
    copies = [sums.inputs.shape[0] for sums in measured]
    grouped = [i for members in groups.values() for i in members]
    starts, position = {}, 0
    for i in grouped:
        starts[i] = position
        position += copies[i]
    order = [starts[i] + c for i in range(len(measured)) for c in range(copies[i])]
    return None if order == sorted(order) else order
