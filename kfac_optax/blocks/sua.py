"""Cheap Kronecker block for convolutions: activations at different positions taken as uncorrelated
(SUA).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Use
from kfac_optax._validate import check_number
from kfac_optax.linalg.factorize import after, psd_inverse, symmetrize
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.two_term import inverse_root
from kfac_optax.linalg.weighted_rows import weighted_gram


class ChannelFactors(NamedTuple):
    """What `Omega` and `Gamma` are made of, all of it sums over the uses of the layer."""

    moment: Float[Array, "C C"]  # T E[x x^T], x the channels at one input position
    mean: Float[Array, " C"]  # T E[x]
    steps: Float[Array, ""]  # T, output positions per example
    level: Float[Array, ""]  # tr(Omega) / p
    outputs: Float[Array, "q q"]  # Gamma


class ChannelInverse(NamedTuple):
    """Parts of the damped inverse; `s = shift / T` is what the damping adds to the covariance of
    one position.
    """

    channels: Float[Array, "C C"]  # (Sigma + s I)^{-1}
    direction: Float[Array, " C"]  # (Sigma + s I)^{-1} mu
    spread: Float[Array, ""]  # mu^T (Sigma + s I)^{-1} mu
    shift: Float[Array, ""]  # s
    steps: Float[Array, ""]  # T
    outputs: Float[Array, "q q"]  # damped inverse of Gamma


def sua(
    channels: int, *, bias: bool | None = None, precision: jax.lax.PrecisionLike = "highest"
) -> Block:
    """Kronecker block `F ~ Omega (x) Gamma` of a convolution from moments of its input's channels
    alone.

    With `k` kernel offsets, `V [k C (+ 1), q]` (rows: offsets, in each the channels, then the
    bias), channel mean `mu`, covariance `Sigma [C, C]` over input positions and `T` output
    positions per example,

        Omega = T (blockdiag(I_k (x) Sigma, 0) + m m^T),   m = [1_k (x) mu; 1],   Gamma = (1/rows)
        sum_rows g g^T.

    No patches are formed and nothing larger than `[C, C]` and `[q, q]` is factorized. Damping is
    factored Tikhonov, `(Omega + pi sqrt(damping) I)^{-1} V (Gamma + sqrt(damping)/pi I)^{-1}` with
    `pi` from the traces of `Omega` and `Gamma`, the first inverse by Sherman-Morrison; the damping
    is the one of the last refresh. Zeros of the padding are not counted.

    `measure` takes the input map `a [N, *spatial, C]` and `g [N, *out_spatial, q]`. Weights count
    per example (their mean over positions). Without `g` (forward only) `Gamma = I`, and `T` is read
    from `use.rows`, which has to count this use only.

    Args:
      channels: `C`.
      bias: whether `V` has a bias row; `None` tells from its size, which one channel does not
        allow.
      precision: matmul precision of factor products and solves.

    Returns:
      A `Block` with `ChannelFactors` as statistic.

    Raises:
      ValueError: `channels` < 1; shapes that do not fit them.

    >>> block = sua(2)
    >>> use = Use(True, 1, 1, 4, jnp.float32)
    >>> factors = block.measure(jnp.ones((1, 4, 2)), jnp.ones((1, 4, 1)), use)
    >>> print(block.multiply(factors, jnp.ones((3 * 2 + 1, 1))).ravel())
    [28. 28. 28. 28. 28. 28. 28.]

    Reference: Grosse & Martens, A Kronecker-factored Approximate Fisher Matrix for Convolution
      Layers (2016), for spatially uncorrelated activations.
    """
    check_number("sua", "channels", channels, at_least=1)

    def split(v: Array) -> tuple[Array, Array | None]:
        """Features `[k, C, q]` and the bias row `[q]`."""
        offsets, extra = _layout(v.shape[0], channels, bias)
        features = v[: offsets * channels].reshape(offsets, channels, v.shape[1])
        return features, v[-1] if extra else None

    def join(features: Array, row: Array | None) -> Array:
        flat = features.reshape(-1, features.shape[-1])
        return flat if row is None else jnp.concatenate([flat, row[None]])

    def init(p: int, q: int, dtype: jnp.dtype) -> ChannelFactors:
        _layout(p, channels, bias)  # for its check
        one = jnp.ones((), dtype)
        zeros = jnp.zeros(channels, dtype)
        return ChannelFactors(
            jnp.eye(channels, dtype=dtype), zeros, one, one, jnp.eye(q, dtype=dtype)
        )

    def measure(a: Array, g: Array | None, use: Use) -> ChannelFactors:
        if a.shape[-1] != channels or a.ndim < 2:
            raise ValueError(
                f"sua: measure got inputs of shape {a.shape}; expected [N, *spatial, {channels}]. "
                "Pass the input map of the convolution, not its patches, and its number of "
                f"channels: sua(channels={a.shape[-1]})."
            )
        a, weights = a.astype(use.dtype), None
        if use.weights is not None:
            per_example = use.weights.astype(use.dtype).mean(range(1, use.weights.ndim))
            weights = jnp.broadcast_to(per_example.reshape(-1, *(1,) * (a.ndim - 2)), a.shape[:-1])
        if g is None:
            outputs, rows = jnp.eye(use.outputs, dtype=use.dtype), use.rows
        else:
            g = g.astype(use.dtype)
            outputs, rows = gram(g, g, precision=precision) / use.rows, math.prod(g.shape[:-1])
        # a column of ones turns the second moments into all that is wanted
        a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)
        moments = (
            rows
            / use.examples
            / math.prod(a.shape[:-1])
            * weighted_gram(a, weights, precision=precision)
        )
        moment, mean, total = moments[:-1, :-1], moments[:-1, -1], moments[-1, -1]
        level = (use.inputs // channels * jnp.trace(moment) + int(use.bias) * total) / (
            use.inputs + use.bias
        )
        return ChannelFactors(moment, mean, total, level, outputs)

    def factorize(factors: ChannelFactors, damping: Array) -> ChannelInverse:
        steps, mean, covariance = _covariance(factors)
        gamma = factors.outputs
        shift, output_shift = tikhonov_shifts(factors.level, jnp.trace(gamma) / len(gamma), damping)
        shift = shift / steps
        root = inverse_root(covariance, shift)
        inverse = jnp.matmul(root, root.T, precision=precision)
        direction = jnp.matmul(inverse, mean, precision=precision)
        outputs = psd_inverse(after(gamma, root), output_shift)
        return ChannelInverse(inverse, direction, jnp.vdot(mean, direction), shift, steps, outputs)

    def solve(inverse: ChannelInverse, v: Array, damping: Array) -> Array:
        features, row = split(v)
        # (D + m m^T)^{-1} with D = blockdiag(I (x) (Sigma + s I), s); the bias is eliminated by
        # hand, because 1 / s would cancel against itself
        inner = jnp.einsum("cd,kdq->kcq", inverse.channels, features, precision=precision)
        along = jnp.einsum("c,kcq->q", inverse.direction, features, precision=precision)
        spread = 1 + features.shape[0] * inverse.spread
        if row is None:
            common = along / spread
        else:
            below = inverse.shift * spread + 1
            common, row = (inverse.shift * along + row) / below, (spread * row - along) / below
        inner = inner - inverse.direction[:, None] * common
        return jnp.matmul(join(inner, row) / inverse.steps, inverse.outputs, precision=precision)

    def multiply(factors: ChannelFactors, v: Array) -> Array:
        steps, mean, covariance = _covariance(factors)
        features, row = split(v)
        common = jnp.einsum("c,kcq->q", mean, features, precision=precision)
        common = common if row is None else common + row
        inner = (
            jnp.einsum("cd,kdq->kcq", covariance, features, precision=precision)
            + mean[:, None] * common
        )
        return jnp.matmul(
            steps * join(inner, None if row is None else common),
            factors.outputs,
            precision=precision,
        )

    return Block("kronecker (sua)", init, measure, factorize, solve, multiply, raw=True)


def _covariance(factors: ChannelFactors) -> tuple[Array, Array, Array]:
    """`T`, `mu` and `Sigma`; `T` is next to nothing where nothing was measured, as it multiplies
    the bias entry.
    """
    steps = jnp.where(factors.steps > 0, factors.steps, jnp.finfo(factors.steps.dtype).eps)
    mean = factors.mean / steps
    return steps, mean, symmetrize(factors.moment / steps - jnp.outer(mean, mean))


def _layout(p: int, channels: int, bias: bool | None) -> tuple[int, bool]:
    """Number of kernel offsets and whether a bias row follows, from the number of rows."""
    extra = p % channels == 1 if bias is None else bias
    if bias is None and channels == 1:
        raise ValueError(
            f"sua: a layer with one channel and {p} rows may or may not have a bias; expected "
            "`bias` to be given. Use sua(channels=1, bias=True) or bias=False."
        )
    if (p - extra) % channels or p - extra < channels:
        raise ValueError(
            f"sua: the layer has {p} rows{', one of them the bias' if extra else ''}; expected a "
            f"multiple of channels={channels} besides the bias. Pass the number of input channels "
            "of this layer."
        )
    return (p - extra) // channels, extra
