"""The Kronecker block of a weight of which only some entries are there, as in autoregressive networks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Staircase
from kfac_optax.blocks.kronecker.kronecker import Factors, kronecker
from kfac_optax.linalg import lapack
from kfac_optax.linalg.factorize import damped
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.staircase import entries, with_bias
from kfac_optax.linalg.tikhonov import factor_shifts
from kfac_optax.linalg.triangular import inverse_of_lower


class TriangularInverse(NamedTuple):
    """Inverse Cholesky factors of both damped factors, rows and columns in the order of the stairs."""

    inputs: Float[Array, "p p"]
    outputs: Float[Array, "q q"]


def masked(
    layer: Layer,
    *,
    sharing: str = "expand",
    positions: int | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Kronecker block of a masked weight, `F ~ M (A (x) G) M`, solved exactly on the entries of `M`.

    With `s = x (w * M)` the gradient of `w` is that of the kernel times `M`, so its curvature is
    that of the kernel between entries of `M` alone. Inverting `A (x) G` and masking the result would
    be the inverse of another matrix, and too long a step: it lets entries move that cannot.

    Where the rows of `M` are nested, so that it is a staircase once rows and columns are in order,
    the exact inverse costs twice what that of the whole matrix does. With `A = L L^T` and
    `G = K K^T` in that order, `L (x) K` is triangular among the entries of `M`, and

    `Y = M * (L^{-1} V K^{-T})`, `X = M * (L^{-T} Y K^{-1})`.

    Factors are those of `kronecker`, the damping is factored as in `kronecker("cholesky")`: among
    the entries of `M` no eigenbasis is a Kronecker product, and there is no exact damping.

    Args:
      layer: one of kind `"masked"`, from `tap_dense(..., mask=)` or `tap_conv(..., mask=)`.
      sharing: as for `kronecker`.
      positions: as for `kronecker`.
      precision: matmul precision of factor products and solves.

    Returns:
      A `Block`; the same one for all layers of one mask.

    Raises:
      ValueError: the layer has no mask; unknown `sharing`, `positions < 1`.

    >>> import kfac_optax as ko
    >>> mask = np.tri(2)
    >>> masked_dense = lambda w, x: ko.tap_dense(x @ (w * mask), x, w, mask=mask)
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(masked_dense(w, x)))
    >>> layers = estimator.layers(jnp.ones((2, 2)), jnp.eye(2))
    >>> print(masked(layers.layers[0]).name)
    masked kronecker

    Reference: the factors are those of Martens & Grosse, Optimizing Neural Networks with
      Kronecker-factored Approximate Curvature (2015); masks of this kind are those of Germain,
      Gregor, Murray & Larochelle, MADE: Masked Autoencoder for Distribution Estimation (2015).
    """
    if layer.mask is None:
        raise ValueError(
            f"masked: layer {layer.path!r} has no mask; expected one of kind 'masked', from "
            "tap_dense(..., mask=mask). Give it another block, for example kronecker()."
        )
    stairs = layer.mask if layer.bias is None else with_bias(layer.mask)
    return _masked(stairs, sharing, positions, precision)


@functools.cache
def _masked(stairs: Staircase, sharing: str, positions: int | None, precision: Any) -> Block:
    whole = kronecker("cholesky", sharing=sharing, positions=positions, precision=precision)
    there = entries(stairs)
    # most entries first, of rows and columns
    rows = np.argsort(stairs.rows).astype(np.int32)
    columns = np.argsort(-np.asarray(stairs.columns), kind="stable").astype(np.int32)
    steps = there[rows][:, columns]

    def in_order(v: Array) -> Array:
        return jnp.where(steps, v[rows][:, columns], 0)

    def back(v: Array) -> Array:
        return jnp.zeros_like(v).at[rows[:, None], columns].set(jnp.where(steps, v, 0))

    def factorize(factors: Factors, damping: Array) -> TriangularInverse:
        shift, output_shift = factor_shifts(*factors, damping)
        inputs = _inverse_factor(factors.inputs, shift, rows)
        outputs = after(factors.outputs, inputs)
        return TriangularInverse(inputs, _inverse_factor(outputs, output_shift, columns))

    def solve(inverse: TriangularInverse, v: Array, damping: Array) -> Array:
        lower, right = inverse
        # entries of M depend on those before them alone
        y = jnp.where(steps, sandwich(lower, in_order(v), right.T, precision=precision), 0)
        return back(sandwich(lower.T, y, right, precision=precision))

    def multiply(factors: Factors, v: Array) -> Array:
        made = sandwich(
            factors.inputs, jnp.where(there, v, 0), factors.outputs, precision=precision
        )
        return jnp.where(there, made, 0)

    def root_solve(inverse: TriangularInverse, z: Array, damping: Array) -> Array:
        # R = L^{-T} among the entries of M
        lower, right = inverse
        return back(sandwich(lower.T, in_order(z), right, precision=precision))

    def logdet(inverse: TriangularInverse, damping: Array, shape: tuple[int, int]) -> Array:
        # 2 sum over M of log L_ii + log K_jj
        logs = [jnp.log(jnp.diagonal(x)) for x in inverse]
        return -2 * jnp.sum(jnp.where(steps, logs[0][:, None] + logs[1], 0))

    return whole._replace(
        name="masked kronecker",
        factorize=factorize,
        solve=solve,
        multiply=multiply,
        solve_rows=None,
        root_solve=root_solve,
        logdet=logdet,
        masks=True,
    )


def knowing_masks(block_of: Callable[[Layer], Block]) -> Callable[[Layer], Block]:
    """The same, but an error where a block would take a masked weight for a whole one.

    >>> whole = lambda layer: kronecker()
    >>> print(knowing_masks(whole)(Layer("", "dense", "w", None, 1, 1, None)).name)
    kronecker (eigh)
    """

    def checked(layer: Layer) -> Block:
        block = block_of(layer)
        if layer.mask is not None and not block.masks:
            raise ValueError(
                f"layer {layer.path!r}: block {block.name!r} solves for all entries of a weight, of "
                "which a mask leaves some; expected masked(layer) for layers with a mask. Take a "
                "preset that knows it (kfac), or leave mask= out of the tap."
            )
        return block

    return checked


def _inverse_factor(
    factor: Float[Array, "n n"], shift: Float[Array, ""], order: np.ndarray
) -> Float[Array, "n n"]:
    """`L^{-1}` with `L L^T` the damped factor in that order; NaN where it is not positive definite."""
    lower = lapack.cholesky(damped(factor, shift)[order][:, order], symmetrize_input=False)
    return inverse_of_lower(lower)
