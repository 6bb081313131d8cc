"""FOOF's blocks: second moments of a layer's inputs, and nothing of its outputs, `F ~ A (x) I`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.diagonal.unitwise import unitwise
from kfac_optax.blocks.embedding.token_moments import token_counts
from kfac_optax.blocks.kronecker.kronecker import SHARING
from kfac_optax.blocks.use_rows import input_rows
from kfac_optax.linalg.factorize import (
    Eigen,
    damped_logdet,
    damped_quotient,
    damped_root,
    psd_eigh,
    psd_inverse,
    psd_root,
)
from kfac_optax.linalg.weighted_rows import weighted_gram

OF = ("linear", "embedding", "tied_embedding", "scale_shift")


class TiedInputs(NamedTuple):
    """Inputs of a table that is looked up in and is also the softmax head, `h -> h E^T`."""

    counts: Float[Array, " p"]  # (1/N) sum w e_token
    head: Float[Array, "q q"]  # (1/N) sum w h h^T


class TiedInputsInverse(NamedTuple):
    """Counts and the eigendecomposition of the head's inputs; the damping enters in every solve."""

    counts: Float[Array, " p"]
    head: Eigen


def foof_block(
    of: str = "linear",
    *,
    sharing: str = "expand",
    positions: int | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block:
    """FOOF's block `F ~ A (x) I`, `A = (1/N) sum_rows a a^T`: how to move the outputs of a layer
    along their own gradients.

    The update `V -> (A + damping I)^{-1} V`, `V [p, q]`, is the minimiser over `U` of

        (1/N) sum_rows |U^T a - g|^2 + damping |U|^2,

    a gradient step on the neurons of the layer. Output gradients are not read, so that any
    estimator serves, `forward_only` above all. Positions that share a weight are added up in `A`,
    as in `kronecker`; `sharing="reduce"` averages them within an example before. Of the other
    kinds of layer:

    - `"embedding"`: inputs are one-hot and `A` is diagonal, the tokens per example;
    - `"tied_embedding"`: `V -> U` with `diag(counts) U + U H + damping U = V`, `H` the second
      moment of the head's inputs, exact in the eigenbasis of `H`;
    - `"scale_shift"`: for every channel the `2 x 2` second moment of `(x, 1)`.

    For `"linear"` the damping is the one of the last refresh, for others that of the step.

    Args:
      of: kind of layer: `"linear"` (dense, convolution, attention projection), `"embedding"`,
        `"tied_embedding"` or `"scale_shift"`.
      sharing: `"expand"` or `"reduce"`; of `"linear"`.
      positions: at most about this many positions of an example are measured, evenly spaced, each
        counting for those left out; `None` measures all. Of `"linear"`.
      precision: matmul precision of moments and solves.

    Returns:
      A `Block` whose statistic is `A [p, p]`, the counts `[p]`, `TiedInputs`, or `[C, 2, 2]`.

    Raises:
      ValueError: an unknown word, `positions < 1`; inputs that do not fit the kind of layer.

    >>> block = foof_block()
    >>> inverse = block.factorize(jnp.diag(jnp.array([3.0, 1.0])), jnp.float32(1.0))
    >>> print(block.solve(inverse, jnp.ones((2, 1)), jnp.float32(1.0)).ravel().round(3))
    [0.25 0.5 ]

    Reference: Benzing, Gradient Descent on Neurons and its Link to Approximate Second-Order
      Optimization (2022).
    """
    check_choice("foof_block", "of", of, OF)
    check_choice("foof_block", "sharing", sharing, SHARING)
    if positions is not None:
        check_number("foof_block", "positions", positions, at_least=1)
    # what the inputs of a layer are decides how A is held
    match of:
        case "embedding":
            return _lookup()
        case "tied_embedding":
            return _tied(precision)
        case "scale_shift":
            return _scale_shift()
        case _:
            return _linear(sharing, positions, precision)


def _linear(
    sharing: str,
    positions: int | None,
    precision: jax.lax.PrecisionLike,
) -> Block:
    def init(layer: Layer, dtype: jnp.dtype) -> Array:
        return jnp.eye(layer.shape[0], dtype=dtype)

    def measure(a: Array, g: Array | None, use: Use) -> Array:
        # A = (1/N) sum_rows w a a^T
        total = weighted_gram(input_rows(a, use), use.weights, precision=precision)
        return total / use.examples

    def solve(inverse: Array, v: Array, damping: Array) -> Array:
        return jnp.matmul(inverse, v, precision=precision)

    def solve_rows(
        inverse: Array,
        a: Array,
        g: Array,
        damping: Array,
    ) -> tuple[Array, tuple[Array, Array]] | None:
        (n, p), q = a.shape, g.shape[1]
        # multiplications: n p^2 + n p q from rows, p^2 q from the gradient that is there already
        if n * (p + q) > p * q:  # more than `solve` takes
            return None
        thin = jnp.matmul(a, inverse, precision=precision)
        return jnp.matmul(thin.T, g, precision=precision), (thin, g)

    def multiply(moment: Array, v: Array) -> Array:
        return jnp.matmul(moment, v, precision=precision)

    def root_solve(inverse: Array, z: Array, damping: Array) -> Array:
        # R R^T = (A + damping I)^{-1}, on the side of the inputs alone
        root, _ = psd_root(inverse)
        return jnp.matmul(root, z, precision=precision)

    def logdet(
        inverse: Array,
        damping: Array,
        shape: tuple[int, int],
    ) -> Array:
        # log det (A (x) I_q) = q log det A
        _, of_inverse = psd_root(inverse)
        return -shape[1] * of_inverse

    return Block(
        "foof" if sharing == "expand" else f"foof ({sharing})",
        init,
        measure,
        psd_inverse,
        solve,
        multiply,
        sharing=sharing,
        positions=positions,
        solve_rows=solve_rows,
        root_solve=root_solve,
        logdet=logdet,
    )


def _lookup() -> Block:
    def init(layer: Layer, dtype: jnp.dtype) -> Array:
        return jnp.ones(layer.inputs, dtype)

    def measure(a: Array, g: Array | None, use: Use) -> Array:
        # A = diag(counts), [p]
        _check_tokens(a)
        return token_counts(a, use)

    def factorize(counts: Array, damping: Array) -> Array:
        return counts

    def solve(counts: Array, v: Array, damping: Array) -> Array:
        # rows of tokens that never occurred have the damping alone
        return damped_quotient(v, counts[:, None], damping, exact=True)

    def multiply(counts: Array, v: Array) -> Array:
        return counts[:, None] * v

    def root_solve(counts: Array, z: Array, damping: Array) -> Array:
        return damped_root(z, counts[:, None], damping, exact=True)

    def logdet(
        counts: Array,
        damping: Array,
        shape: tuple[int, int],
    ) -> Array:
        return shape[1] * damped_logdet(counts, damping, exact=True)

    return Block(
        "foof (tokens)",
        init,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=logdet,
    )


def _tied(precision: jax.lax.PrecisionLike) -> Block:
    def init(layer: Layer, dtype: jnp.dtype) -> TiedInputs:
        p, q = layer.shape
        # the two terms add up to the identity
        halves = jnp.full(p, 0.5, dtype)
        return TiedInputs(halves, 0.5 * jnp.eye(q, dtype=dtype))

    def measure(a: Array, g: Array | None, use: Use) -> TiedInputs:
        q = use.outputs
        # a look-up, integer tokens: diag(counts) V
        if jnp.issubdtype(a.dtype, jnp.integer):
            no_head = jnp.zeros((q, q), use.dtype)
            return TiedInputs(token_counts(a, use), no_head)
        if a.shape[-1] != q:
            raise ValueError(
                f"foof_block: measure got head inputs of size {a.shape[-1]}; expected {q} for a "
                f"table {use.inputs}x{q}. Pass h [*rows, {q}] of h @ table.T."
            )
        # a use as head, V H: its inputs h [*rows, q] are on the other side of the table
        h = a.astype(use.dtype)
        moment = weighted_gram(h, use.weights, precision=precision)
        no_counts = jnp.zeros(use.inputs, use.dtype)
        return TiedInputs(no_counts, moment / use.examples)

    def factorize(inputs: TiedInputs, damping: Array) -> TiedInputsInverse:
        return TiedInputsInverse(inputs.counts, psd_eigh(inputs.head))

    def solve(inverse: TiedInputsInverse, v: Array, damping: Array) -> Array:
        vectors, values = inverse.head
        # with H = U diag(s) U^T, diag(counts) X + X H + damping X = V is solved entry by entry in X
        # U
        rotated = jnp.matmul(v, vectors, precision=precision)
        scaled = damped_quotient(rotated, inverse.counts[:, None] + values, damping)
        return jnp.matmul(scaled, vectors.T, precision=precision)

    def multiply(inputs: TiedInputs, v: Array) -> Array:
        of_head = jnp.matmul(v, inputs.head, precision=precision)
        return inputs.counts[:, None] * v + of_head

    def root_solve(inverse: TiedInputsInverse, z: Array, damping: Array) -> Array:
        vectors, values = inverse.head
        # R Z = (Z / sqrt(counts + s^T + damping)) U^T
        scaled = damped_root(z, inverse.counts[:, None] + values, damping)
        return jnp.matmul(scaled, vectors.T, precision=precision)

    return Block(
        "foof (tied)",
        init,
        measure,
        factorize,
        solve,
        multiply,
        root_solve=root_solve,
        logdet=_logdet_of_tied,
    )


def _logdet_of_tied(
    inverse: TiedInputsInverse,
    damping: Array,
    shape: tuple[int, int],
) -> Array:
    # eigenvalues of V -> diag(counts) V + V H: all sums of one of each, [p, q]
    eigenvalues = inverse.counts[:, None] + inverse.head.values
    return damped_logdet(eigenvalues, damping)


def _scale_shift() -> Block:
    """The unit-wise block as it is without output gradients: every position a unit gradient."""
    plain = unitwise()

    def measure(a: Array, g: Array | None, use: Use) -> Array:
        return plain.measure(a, None, use)

    return plain._replace(name="foof (unit-wise)", measure=measure)


def _check_tokens(a: Array) -> None:
    if not jnp.issubdtype(a.dtype, jnp.integer):
        raise ValueError(
            f"foof_block: measure got inputs of dtype {a.dtype}; expected integer tokens. Use "
            "foof_block('linear') for a dense layer."
        )
