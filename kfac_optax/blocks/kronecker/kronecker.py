"""K-FAC's Kronecker block for layers with a weight matrix, `F ~ A (x) G`. Martens & Grosse (2015),
sections 3 and 6.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.use_rows import input_rows, share_of_layer
from kfac_optax.linalg.factorize import (
    Eigen,
    cholesky_inverse,
    damped,
    damped_logdet,
    damped_root,
    psd_eigh,
    psd_inverse,
    psd_root,
)
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.kronecker_products import eigen_solve, sandwich
from kfac_optax.linalg.newton import newton_inverse
from kfac_optax.linalg.tikhonov import factor_shifts
from kfac_optax.linalg.weighted_rows import weighted_gram

INVERSES = ("eigh", "cholesky", "newton")
SHARING = ("expand", "reduce")


class Factors(NamedTuple):
    """The two Kronecker factors, `A = E[a a^T]` and `G = E[g g^T]`."""

    inputs: Float[Array, "p p"]
    outputs: Float[Array, "q q"]


class EigenInverse(NamedTuple):
    """Eigendecompositions of both factors; the damping enters in every solve, exactly."""

    inputs: Eigen
    outputs: Eigen


class DenseInverse(NamedTuple):
    """`(A + pi sqrt(damping) I)^{-1}` and `(G + sqrt(damping)/pi I)^{-1}`."""

    inputs: Float[Array, "p p"]
    outputs: Float[Array, "q q"]


Inverse = EigenInverse | DenseInverse


def kronecker(
    inverse: str = "eigh",
    *,
    sharing: str = "expand",
    positions: int | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Kronecker block `F ~ A (x) G` of a layer with a weight matrix: dense, convolution, attention
    projection.

    `A = (1/N) sum_rows a a^T` over all uses of the layer, `G = (1/rows) sum_rows g g^T`; for a
    layer that runs once per example both are means over examples, for a weight-shared one positions
    are summed in `A` and averaged in `G` (KFC for convolutions, whose rows are patches;
    KFAC-expand). With `sharing="reduce"` an example's inputs are averaged over positions and its
    output gradients added up before (KFAC-reduce), for models that pool positions before the
    loss. Solves, with `V [p, q]`:

    - `"eigh"`: exact damping `(A (x) G + damping I)^{-1} V` in the Kronecker eigenbasis; the
      pseudo-inverse where the damping leaves it singular to working precision, see `eigen_solve`.
    - `"cholesky"`: factored Tikhonov,
      `(A + pi sqrt(damping) I)^{-1} V (G + sqrt(damping)/pi I)^{-1}` with
      `pi = sqrt((tr A / p) / (tr G / q))`; the damping is the one of the last refresh. Neither
      shift is smaller than rounding of the factor's mean eigenvalue.
    - `"newton"`: the same inverses as `"cholesky"`, refreshed by products alone from those that
      are held, see `newton_inverse`; for accelerators.

    Args:
      inverse: `"eigh"`, `"cholesky"` or `"newton"`.
      sharing: `"expand"` or `"reduce"`.
      positions: at most about this many positions of an example are measured, evenly spaced, each
        counting for those left out; `None` measures all. With `"reduce"` it has no effect.
      precision: matmul precision of factor products and solves; lower it only for speed.

    Returns:
      A `Block`.

    Raises:
      ValueError: unknown `inverse` or `sharing`, `positions < 1`.

    >>> block = kronecker("cholesky")
    >>> inverse = block.factorize(Factors(jnp.eye(2), jnp.eye(2)), jnp.float32(1.0))
    >>> print(block.solve(inverse, jnp.ones((2, 2)), jnp.float32(1.0)).round(4))
    [[0.25 0.25]
     [0.25 0.25]]

    Reference: Martens & Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature (2015), section 6.3 for factored Tikhonov damping; Grosse & Martens, A
      Kronecker-factored Approximate Fisher Matrix for Convolution Layers (2016); Eschenhagen et
      al., Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures (2023)
      for expand and reduce.
    """
    check_choice("kronecker", "inverse", inverse, INVERSES)
    check_choice("kronecker", "sharing", sharing, SHARING)
    if positions is not None:
        check_number("kronecker", "positions", positions, at_least=1)

    def init(layer: Layer, dtype: jnp.dtype) -> Factors:
        p, q = layer.shape
        return Factors(jnp.eye(p, dtype=dtype), jnp.eye(q, dtype=dtype))

    def measure(a: Array, g: Array | None, use: Use) -> Factors:
        # A = (1/N) sum_rows w a a^T
        a = input_rows(a, use)
        inputs = weighted_gram(a, use.weights, precision=precision) / use.examples
        if g is None:  # forward only: G := I, shared out over the uses, which are added up
            identity = jnp.eye(use.outputs, dtype=use.dtype)
            return Factors(inputs, share_of_layer(a, use) * identity)
        # G = (1/rows) sum_rows g g^T, the root of the weight being inside g
        g = g.astype(use.dtype)
        outputs = gram(g, g, precision=precision) / use.rows
        return Factors(inputs, outputs)

    def factorize(factors: Factors, damping: Array) -> Inverse:
        # undamped: the damping enters in every solve
        if inverse == "eigh":
            inputs = psd_eigh(factors.inputs)
            outputs = after(factors.outputs, inputs.values)
            return EigenInverse(inputs, psd_eigh(outputs))
        # pi sqrt(damping) for A and sqrt(damping) / pi for G
        shift, output_shift = factor_shifts(*factors, damping)
        inverse_inputs = psd_inverse(factors.inputs, shift)
        outputs = after(damped(factors.outputs, output_shift), inverse_inputs)
        return DenseInverse(inverse_inputs, cholesky_inverse(outputs))

    def refresh(
        held: DenseInverse,
        factors: Factors,
        damping: Array,
        count: Array,
    ) -> DenseInverse:
        del count
        shift, output_shift = factor_shifts(*factors, damping)
        # the factors have moved little since the last refresh: its inverses are near
        inputs = newton_inverse(factors.inputs, shift, held.inputs)
        outputs = after(factors.outputs, inputs)
        return DenseInverse(inputs, newton_inverse(outputs, output_shift, held.outputs))

    def solve(inverse: Inverse, v: Array, damping: Array) -> Array:
        if isinstance(inverse, EigenInverse):
            return eigen_solve(inverse.inputs, inverse.outputs, v, damping, precision=precision)
        return sandwich(inverse.inputs, v, inverse.outputs, precision=precision)

    def solve_rows(
        inverse: DenseInverse,
        a: Array,
        g: Array,
        damping: Array,
    ) -> tuple[Array, tuple[Array, Array]] | None:
        (n, p), q = a.shape, g.shape[1]
        # multiplications, from the rows or from the gradient that is there already
        from_rows = n * (p * p + q * q + p * q)
        from_gradient = p * q * (p + q)
        if from_rows > from_gradient:
            return None
        # a^T g = V: (A^{-1} a^T) (g G^{-1}) never forms V before it is preconditioned
        thin_a = jnp.matmul(a, inverse.inputs, precision=precision)
        thin_g = jnp.matmul(g, inverse.outputs, precision=precision)
        return jnp.matmul(thin_a.T, thin_g, precision=precision), (thin_a, thin_g)

    def multiply(factors: Factors, v: Array) -> Array:
        return sandwich(factors.inputs, v, factors.outputs, precision=precision)

    def root_solve(inverse: Inverse, z: Array, damping: Array) -> Array:
        if isinstance(inverse, EigenInverse):
            # noise is as white in the eigenbasis as it is outside
            values = inverse.inputs.values[:, None] * inverse.outputs.values
            scaled = damped_root(z, values, damping)
            u_a, u_g = inverse.inputs.vectors, inverse.outputs.vectors
            return sandwich(u_a, scaled, u_g.T, precision=precision)
        # R Z = R_A Z R_G^T with R_A R_A^T = A^{-1}, R_G R_G^T = G^{-1}
        root_a, root_g, _ = _roots(inverse)
        return sandwich(root_a, z, root_g.T, precision=precision)

    def logdet(
        inverse: Inverse,
        damping: Array,
        shape: tuple[int, int],
    ) -> Array:
        if isinstance(inverse, EigenInverse):
            values = inverse.inputs.values[:, None] * inverse.outputs.values
            return damped_logdet(values, damping)
        # of the inverses that are held, hence the sign
        *_, of_inverse = _roots(inverse)
        return -of_inverse

    words = inverse if sharing == "expand" else f"{inverse}, {sharing}"
    return Block(
        f"kronecker ({words})",
        init,
        measure,
        factorize,
        solve,
        multiply,
        sharing=sharing,
        positions=positions,
        refresh=refresh if inverse == "newton" else None,
        solve_rows=None if inverse == "eigh" else solve_rows,
        root_solve=root_solve,
        logdet=logdet,
    )


def _roots(inverse: DenseInverse) -> tuple[Array, Array, Array]:
    """Square roots of both inverses, and the log determinant of their Kronecker product."""
    root_a, logdet_a = psd_root(inverse.inputs)
    root_g, logdet_g = psd_root(after(inverse.outputs, root_a))
    # log det(A (x) G) = q log det A + p log det G
    p, q = len(root_a), len(root_g)
    return root_a, root_g, q * logdet_a + p * logdet_g
