"""Kronecker blocks that model how the gradients of one layer at different time steps correlate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax._validate import check_choice
from kfac_optax.blocks.use_rows import input_rows
from kfac_optax.linalg import lapack
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.linalg.factorize import symmetrize
from kfac_optax.linalg.geometric_sums import eta as eta
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.kronecker_products import sandwich
from kfac_optax.linalg.tikhonov import factor_shifts
from kfac_optax.linalg.two_term import Pencil, inverse_root, two_term_solve
from kfac_optax.linalg.weighted_rows import keep_rows

OPTIONS = ("option1", "option2")
# of a correlation between neighbouring steps: one would leave directions without variance
_LARGEST = 1 - 1e-6
_DOUBLINGS = 30  # terms of a geometric series summed are 2^30


class TemporalFactors(NamedTuple):
    """Second moments of inputs and output gradients at equal times and one step apart, and how long
    sequences are.
    """

    inputs: Float[Array, "p p"]  # A0 = E[a_t a_t^T]
    outputs: Float[Array, "q q"]  # G0 = E[g_t g_t^T]
    inputs_lag: Float[Array, "p p"]  # A1 = E[a_{t+1} a_t^T]
    outputs_lag: Float[Array, "q q"]  # G1 = E[g_{t+1} g_t^T]
    steps: Float[Array, ""]  # (1/N) sum_t w_t
    # (1/N) sum_t (sqrt(w_{t+1}) - sqrt(w_t))^2 / 2: stretches of steps, one for whole sequences
    ends: Float[Array, ""]


class SymmetricInverse(NamedTuple):
    """Option 1: bases `L` of both sides and `1 / eta` of the products of their correlations."""

    inputs: Float[Array, "p p"]
    outputs: Float[Array, "q q"]
    scale: Float[Array, "p q"]


class GeneralInverse(NamedTuple):
    """Option 2: `P = C1^T C0^{-1}` and pencil `(K, m)` of both sides, and `T`."""

    inputs: Float[Array, "p p"]
    outputs: Float[Array, "q q"]
    inputs_pencil: Pencil
    outputs_pencil: Pencil
    steps: Float[Array, ""]


Inverse = SymmetricInverse | GeneralInverse


def recurrent(option: str = "option1", *, precision: jax.lax.PrecisionLike = "highest") -> Block:
    """Block of a layer used at steps `1..T`, `F = sum_{s,t} cov(w_s, w_t)` for
    `w_t = vec(a_t g_t^T)`.

    `w_t` follows a stationary linear Gaussian chain, `w_{t+1} = Psi w_t + noise`, so that
    `cov(w_{t+d}, w_t) = Psi^d V0` with `V0 = A0 (x) G0`, `V1 = A1 (x) G1`, `Psi = V1 V0^{-1}`.
    Statistics: `A0 = E[a_t a_t^T]`, `G0 = E[g_t g_t^T]`, `A1 = E[a_{t+1} a_t^T]`,
    `G1 = E[g_{t+1} g_t^T]`, all divided by `N T`, the last two as well, since sequences continued
    by zeros have covariances that belong together. Solves, for `C` either of `A` and `G` and
    `Psi_C = C0^{-1/2} C1 C0^{-1/2}`:

    - `"option1"`, time reversible: with `(C1 + C1^T) / 2` for `C1`, `Psi_C = U_C diag(x_C) U_C^T`,
      `L_C = C0^{-1/2} U_C`, `V -> L_A [(L_A^T V L_G) / eta(x_A x_G^T)] L_G^T`,
      `eta(x) = sum_{|d|<T} (T - |d|) x^|d|`.
    - `"option2"`, long sequences, `F = T (I - Psi)^{-1} (V0 - Psi V0 Psi^T) (I - Psi^T)^{-1}`: with
      `P_C = C1^T C0^{-1}`, `Psi_C^T Psi_C = E_C diag(m_C) E_C^T`, `K_C = C0^{-1/2} E_C`:
      `Z = V - P_A V P_G^T`, `Z <- K_A [(K_A^T Z K_G) / (1 - m_A m_G^T)] K_G^T`,
      `V -> (Z - P_A^T Z P_G) / T`.

    `C0` is damped by `pi^{+-1} sqrt(damping / T)` before anything else, with
    `pi = sqrt((tr A0 / p) / (tr G0 / q))`, for `F` holds `T` products; `C1` is not. For `T = 1`
    both are K-FAC with factored Tikhonov damping. The damping is the one of the last refresh.

    Sequences of unequal length come as weights `[N, T]` that are zero behind the end; steps of
    weight zero are dropped, and no pair crosses one. Two scalars are kept, `steps`, the mean over
    examples of the summed weights (the scale `T` of equal-time terms), and `ends`, the weighted
    number of ends of sequences, so that `steps / ends` is the mean length of those that are not
    empty. `eta` is interpolated between the whole lengths next to it: exact where lengths differ by
    at most one step, otherwise an approximation of its mean over lengths that only matters for `x`
    near one.

    Args:
      option: `"option1"` or `"option2"`.
      precision: matmul precision of factor products and solves.

    Returns:
      A `Block` that measures all steps at once, `a [N, T, p]` without bias column and
      `g [N, T, q]`. Without `g` (forward only) `G0 = I`, `G1 = 0`: steps independent. `multiply`
      factorizes the undamped statistics each time.

    Raises:
      ValueError: unknown `option`; `a` has no axis of steps.

    >>> import kfac_optax as ko
    >>> block, layer = recurrent(), ko.testing.dense_layer(1, 1)
    >>> a = g = jnp.ones((1, 4, 1))
    >>> factors = block.measure(a, g, Use(layer, 1, 4, jnp.float32))
    >>> print(factors.inputs, factors.inputs_lag, factors.steps / factors.ends)
    [[1.]] [[0.75]] 4.0

    Reference: Martens, Ba & Johnson, Kronecker-factored Curvature Approximations for Recurrent
      Neural Networks (2018).
    """
    check_choice("recurrent", "option", option, OPTIONS)

    def init(layer: Layer, dtype: jnp.dtype) -> TemporalFactors:
        p, q = layer.shape
        one = jnp.ones((), dtype)
        # steps that do not correlate, in sequences of length one
        return TemporalFactors(
            inputs=jnp.eye(p, dtype=dtype),
            outputs=jnp.eye(q, dtype=dtype),
            inputs_lag=jnp.zeros((p, p), dtype),
            outputs_lag=jnp.zeros((q, q), dtype),
            steps=one,
            ends=one,
        )

    def measure(a: Array, g: Array | None, use: Use) -> TemporalFactors:
        if a.ndim != 3:
            raise ValueError(
                f"recurrent: measure got inputs of shape {a.shape}; expected [N, T, features]. Use "
                "kronecker() for a layer without time steps."
            )
        count = use.examples * a.shape[1]
        a = input_rows(a, use)
        weights = jnp.ones(a.shape[:2], use.dtype)
        if use.weights is not None:
            weights = use.weights.astype(use.dtype)
        # both factors carry the root: products of neighbours have sqrt(w_{t+1} w_t)
        root = jnp.sqrt(weights)
        a = keep_rows(a, use.weights) * root[..., None]
        # zero inside a stretch of equal weights, so it counts its two ends
        between_zeros = jnp.pad(root, ((0, 0), (1, 1)))
        jumps = jnp.diff(between_zeros, axis=1)
        steps = jnp.sum(weights) / use.examples
        ends = jnp.sum(jnp.square(jumps)) / (2 * use.examples)
        inputs, inputs_lag = _moments(a, count, precision)
        if g is None:
            # forward only: G0 := I, and no correlation of output gradients
            outputs = jnp.eye(use.outputs, dtype=use.dtype)
            outputs_lag = jnp.zeros_like(outputs)
        else:
            outputs, outputs_lag = _moments(g.astype(use.dtype), count, precision)
        return TemporalFactors(inputs, outputs, inputs_lag, outputs_lag, steps, ends)

    def factorize(factors: TemporalFactors, damping: Array) -> Inverse:
        # F is of the order of T times the block of one step, which therefore has damping / T
        steps, length = _lengths(factors)
        shift, output_shift = factor_shifts(factors.inputs, factors.outputs, damping / steps)
        # W with W^T C0 W = I; Psi_C = W^T C1 W in these coordinates
        root = inverse_root(factors.inputs, shift)
        output_root = inverse_root(after(factors.outputs, root), output_shift)
        if option == "option1":
            left, x = _symmetric(root, after(factors.inputs_lag, output_root))
            right, y = _symmetric(output_root, after(factors.outputs_lag, left))
            total = steps / length * eta(x[:, None] * y, length)
            return SymmetricInverse(left, right, 1 / total)
        left = _squared(root, after(factors.inputs_lag, output_root))
        right = _squared(output_root, after(factors.outputs_lag, left.vectors))
        # P = C1^T C0^{-1}
        transfer = _product(factors.inputs_lag.T, root, root.T)
        output_transfer = _product(factors.outputs_lag.T, output_root, output_root.T)
        return GeneralInverse(transfer, output_transfer, left, right, steps)

    def solve(inverse: Inverse, v: Array, damping: Array) -> Array:
        if isinstance(inverse, SymmetricInverse):
            # L_A [(L_A^T V L_G) / eta] L_G^T
            rotated = _product(inverse.inputs.T, v, inverse.outputs)
            return _product(inverse.inputs, inverse.scale * rotated, inverse.outputs.T)
        # both factors of the chain, V - P_A V P_G^T first and its transpose last, and between them
        # the noise V0 - Psi V0 Psi^T
        z = v - _product(inverse.inputs, v, inverse.outputs.T)
        z = two_term_solve(
            inverse.inputs_pencil,
            inverse.outputs_pencil,
            z,
            minus=True,
            precision=precision,
        )
        back = _product(inverse.inputs.T, z, inverse.outputs)
        return (z - back) / inverse.steps

    def multiply(factors: TemporalFactors, v: Array) -> Array:
        steps, length = _lengths(factors)
        root = inverse_root(factors.inputs, singular=True)
        output_root = inverse_root(after(factors.outputs, root), singular=True)
        # C0 W is the square root that belongs to the inverse square root W
        back = jnp.matmul(factors.inputs, root, precision=precision)
        output_back = jnp.matmul(factors.outputs, output_root, precision=precision)
        rotated = _product(back.T, v, output_back)
        inputs_lag = after(factors.inputs_lag, output_root)
        if option == "option1":
            left, x = _symmetric(root, inputs_lag, rotate_only=True)
            outputs_lag = after(factors.outputs_lag, left)
            right, y = _symmetric(output_root, outputs_lag, rotate_only=True)
            scale = steps / length * eta(x[:, None] * y, length)
            inside = scale * _product(left.T, rotated, right)
            middle = _product(left, inside, right.T)
        else:
            # sum_{|d|} Psi^d = (I - Psi)^{-1} + transpose - I in whitened coordinates
            left = _squared(root, inputs_lag)
            right = _squared(output_root, after(factors.outputs_lag, left.vectors))
            psi = _product(root.T, factors.inputs_lag, root)
            phi = _product(output_root.T, factors.outputs_lag, output_root)
            psi, phi = _shrunk(psi, left.values), _shrunk(phi, right.values)
            forward = _geometric(psi, phi, rotated)
            backward = _geometric(psi.T, phi.T, rotated)
            middle = steps * (forward + backward - rotated)
        return _product(back, middle, output_back.T)

    def _product(left: Array, middle: Array, right: Array) -> Array:
        return sandwich(left, middle, right, precision=precision)

    def _symmetric(
        root: Array,
        lag: Array,
        rotate_only: bool = False,
    ) -> tuple[Array, Array]:
        # the symmetric part is what a time-reversible chain has
        psi = _product(root.T, lag, root)
        values, rotation = lapack.eigh(symmetrize(psi))
        basis = rotation if rotate_only else jnp.matmul(root, rotation, precision=precision)
        return basis, jnp.clip(values, -_LARGEST, _LARGEST)

    def _squared(root: Array, lag: Array) -> Pencil:
        # Psi^T Psi in whitened coordinates, whose eigenvalues m are squared singular values
        psi = _product(root.T, lag, root)
        square = jnp.matmul(psi.T, psi, precision=precision)
        values, rotation = lapack.eigh(symmetrize(square))
        vectors = jnp.matmul(root, rotation, precision=precision)
        return Pencil(vectors, values)

    def _geometric(left: Array, right: Array, v: Array) -> Array:
        """`sum_{d >= 0} left^d V (right^T)^d`, terms doubled in every round."""

        def double(_: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            left, right, total = carry
            # S_{2n} = S_n + left^n S_n (right^T)^n
            total = total + _product(left, total, right.T)
            left = jnp.matmul(left, left, precision=precision)
            right = jnp.matmul(right, right, precision=precision)
            return left, right, total

        _, _, total = jax.lax.fori_loop(0, _DOUBLINGS, double, (left, right, v))
        return total

    return Block(f"recurrent ({option})", init, measure, factorize, solve, multiply, rows=True)


def _shrunk(psi: Array, squares: Array) -> Array:
    """`psi` with singular values below one, as those of sequences are up to rounding; else its
    powers would explode.
    """
    largest = jnp.sqrt(jnp.maximum(squares[-1], _LARGEST**2))
    return psi * jnp.minimum(1, _LARGEST / largest)


def _moments(
    x: Array,
    count: int,
    precision: jax.lax.PrecisionLike,
) -> tuple[Array, Array]:
    """`sum x_t x_t^T` and `sum x_{t+1} x_t^T`, both divided by `count`."""
    now = gram(x, x, precision=precision) / count
    later, earlier = x[:, 1:], x[:, :-1]
    return now, gram(later, earlier, precision=precision) / count


def _lengths(factors: TemporalFactors) -> tuple[Array, Array]:
    """Scale `T` of the equal-time terms and mean length of a sequence; one where nothing was
    measured.
    """
    steps = positive_or_one(factors.steps)
    measured = (factors.ends > 0) & (factors.steps > 0)
    ends = jnp.where(measured, factors.ends, steps)
    return steps, jnp.maximum(steps / ends, 1)
