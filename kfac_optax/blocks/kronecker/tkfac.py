"""Trace-restricted Kronecker blocks: `A (x) G` with the two partial traces of the Fisher block."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice, check_number, check_unused
from kfac_optax.blocks.kronecker.kronecker import DenseInverse, Factors, Inverse, kronecker
from kfac_optax.blocks.refusals import given_outputs
from kfac_optax.blocks.use_rows import input_rows
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.example_moments import example_rows
from kfac_optax.linalg.factorize import at_least_rounding, psd_inverse
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.rearrangement import contract
from kfac_optax.linalg.weighted_rows import keep_rows, weighted_gram

INVERSES = ("eigh", "cholesky")
SHARING = ("expand", "exact")
SPLIT = ("even", "trace")


def tkfac_block(
    inverse: str = "eigh",
    *,
    sharing: str = "expand",
    positions: int | None = None,
    split: str = "even",
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """Trace-restricted block `F ~ delta Phi (x) Psi`, `tr Phi = tr Psi = 1`.

    `delta = E[|a|^2 |g|^2]`, `delta Phi = E[|g|^2 a a^T]`, `delta Psi = E[|a|^2 g g^T]` over the
    examples of a layer that runs once for each: the trace and both partial traces of the exact
    block. Where `|a|` and `|g|` do not vary over the batch it is `kronecker()`. The two moments are
    what is averaged, both with trace `delta`. Of positions that share a weight,

    - `sharing="expand"` has the moments of an example in place of those of a row,
      `delta Phi = E[tr(Gamma) Lambda]`, `delta Psi = E[tr(Lambda) Gamma]`, with
      `Lambda = sum_t a a^T` added up over positions and `Gamma = (1/T) sum_t g g^T` averaged, as
      for convolutions in `kronecker`;
    - `sharing="exact"` has `E[D D^T]` and `E[D^T D]` of the gradient `D = sum_t a g^T` of an
      example, the partial traces of the exact block for any number of positions.

    Solves, with `V [p, q]`: `"eigh"` damps exactly; `"cholesky"` gives
    `(sqrt(delta) Phi + x I)^{-1} V (sqrt(delta) Psi + y I)^{-1}`, of the damping of the last
    refresh, with `split="even"`: `x = y = sqrt(damping)`, or `"trace"`: in the proportion of the
    mean eigenvalues, as in `kronecker`, `x / y = q / p`.

    Args:
      inverse: `"eigh"` or `"cholesky"`.
      sharing: `"expand"` or `"exact"`.
      positions: at most about this many positions of an example are measured, evenly spaced, each
        counting for those left out; `None` for all. Not with `"exact"`.
      split: of the damping, with `"cholesky"`: `"even"` or `"trace"`.
      precision: matmul precision of moments and solves.

    Returns:
      A `Block` with `Factors` as statistic, `delta Phi` and `delta Psi`.

    Raises:
      ValueError: an unknown word, or one without effect; `positions < 1`.

    >>> block = tkfac_block()
    >>> inverse = block.factorize(Factors(jnp.eye(2), jnp.full((1, 1), 2.0)), jnp.float32(1.0))
    >>> print(block.solve(inverse, jnp.ones((2, 1)), jnp.float32(1.0)).ravel())
    [0.5 0.5]

    Reference: Gao et al., A Trace-restricted Kronecker-Factored Approximation to Natural Gradient
      (2021).
    """
    where = "tkfac_block"
    check_choice(where, "inverse", inverse, INVERSES)
    check_choice(where, "sharing", sharing, SHARING)
    check_choice(where, "split", split, SPLIT)
    if inverse == "eigh":
        check_unused(where, "inverse='eigh', whose damping is exact", split=(split, "even"))
    if positions is not None:
        check_number(where, "positions", positions, at_least=1)
    if sharing == "exact":
        check_unused(where, "sharing='exact', of whole examples", positions=(positions, None))
    # delta Phi (x) Psi is a Kronecker product like any other once it is scaled
    plain = kronecker(inverse, precision=precision)
    moments = _moments_of_positions if sharing == "expand" else _partial_traces

    def measure(a: Array, g: Array | None, use: Use) -> Factors:
        return moments(a, given_outputs(where, g), use, precision)

    def factorize(factors: Factors, damping: Array) -> Inverse:
        # delta Phi / sqrt(delta): the product of both is delta Phi (x) Psi
        root = jnp.sqrt(jnp.trace(factors.inputs))
        divisor = positive_or_one(root)
        scaled = Factors(factors.inputs / divisor, factors.outputs / divisor)
        if inverse == "eigh" or split == "trace":
            return plain.factorize(scaled, damping)
        # sqrt(damping) on both sides, since both have the trace sqrt(delta)
        shift = at_least_rounding(jnp.sqrt(damping), root)
        inputs = psd_inverse(scaled.inputs, shift)
        outputs = after(scaled.outputs, inputs)
        return DenseInverse(inputs, psd_inverse(outputs, shift))

    def multiply(factors: Factors, v: Array) -> Array:
        # Phi V Psi delta = (delta Phi) V (delta Psi) / delta
        delta = jnp.trace(factors.inputs)
        product = sandwich(factors.inputs, v, factors.outputs, precision=precision)
        return product / positive_or_one(delta)

    words = inverse if sharing == "expand" else f"{inverse}, {sharing}"
    return plain._replace(
        name=f"tkfac ({words})",
        init=_start,
        measure=measure,
        factorize=factorize,
        multiply=multiply,
        positions=positions,
        per_example=True,
    )


def _start(layer: Layer, dtype: jnp.dtype) -> Factors:
    """Both partial traces of the identity."""
    p, q = layer.shape
    inputs = q * jnp.eye(p, dtype=dtype)
    outputs = p * jnp.eye(q, dtype=dtype)
    return Factors(inputs, outputs)


def _partial_traces(
    a: Array,
    g: Array,
    use: Use,
    precision: jax.lax.PrecisionLike,
) -> Factors:
    # (1/N) sum_b D_b D_b^T and (1/N) sum_b D_b^T D_b
    a, g = example_rows(a, g, use)
    inputs = contract(a, g, precision=precision)
    outputs = contract(g, a, precision=precision)
    return Factors(inputs / use.examples, outputs / use.examples)


def _moments_of_positions(
    a: Array, g: Array, use: Use, precision: jax.lax.PrecisionLike
) -> Factors:
    a = keep_rows(input_rows(a, use), use.weights)
    g = g.astype(use.dtype)
    rows = tuple(range(1, a.ndim - 1))  # all axes between examples and features
    weights = jnp.ones((), use.dtype)
    if use.weights is not None:
        weights = use.weights.astype(use.dtype)
    weights = jnp.broadcast_to(weights, a.shape[:-1])
    # Gamma is a weighted mean: g has the root of its weight inside
    total = jnp.sum(weights, rows, keepdims=True)
    share = jnp.where(total > 0, 1 / positive_or_one(total), 0)
    # tr Lambda and tr Gamma, [n, 1, ...]
    square_a, square_g = jnp.sum(a * a, -1), jnp.sum(g * g, -1)
    trace_a = jnp.sum(weights * square_a, rows, keepdims=True)
    trace_g = share * jnp.sum(square_g, rows, keepdims=True)
    inputs = weighted_gram(a, weights * trace_g, precision=precision)
    left = g * (share * trace_a)[..., None]
    outputs = gram(left, g, precision=precision)
    return Factors(inputs / use.examples, outputs / use.examples)
