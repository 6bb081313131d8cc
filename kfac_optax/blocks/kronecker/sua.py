"""Cheap Kronecker block for convolutions: activations at different positions taken as uncorrelated
(SUA).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax._types import Block, Layer, Use
from kfac_optax.linalg.factorize import psd_inverse, symmetrize
from kfac_optax.linalg.gram import gram, homogeneous
from kfac_optax.linalg.in_order import after
from kfac_optax.linalg.tikhonov import tikhonov_shifts
from kfac_optax.linalg.two_term import inverse_root
from kfac_optax.linalg.weighted_rows import weighted_gram


class ChannelFactors(NamedTuple):
    """What `Omega` and `Gamma` are made of, all of it sums over the uses of the layer."""

    moment: Float[Array, "C C"]  # T E[x x^T], x the channels at one input position
    mean: Float[Array, " C"]  # T E[x]
    steps: Float[Array, ""]  # T, output positions per example
    level: Float[Array, ""]  # tr(Omega) / p
    bias: Float[Array, " rows"]  # the entry of Omega for the bias; empty where there is none
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
    bias: Float[Array, " rows"]  # as in the factors
    outputs: Float[Array, "q q"]  # damped inverse of Gamma


def sua(*, precision: jax.lax.PrecisionLike = "highest") -> Block:
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
      precision: matmul precision of factor products and solves.

    Returns:
      A `Block` with `ChannelFactors` as statistic.

    Raises:
      ValueError: the layer is no plain convolution; inputs that are not its map.

    >>> import kfac_optax as ko
    >>> block = sua()
    >>> layer = ko.testing.dense_layer(3 * 2, 1, bias=True, kind="conv", channels=2)
    >>> use = Use(layer, 1, 4, jnp.float32)
    >>> factors = block.measure(jnp.ones((1, 4, 2)), jnp.ones((1, 4, 1)), use)
    >>> print(block.multiply(factors, jnp.ones((3 * 2 + 1, 1))).ravel())
    [28. 28. 28. 28. 28. 28. 28.]

    Reference: Grosse & Martens, A Kronecker-factored Approximate Fisher Matrix for Convolution
      Layers (2016), for spatially uncorrelated activations.
    """

    def init(layer: Layer, dtype: jnp.dtype) -> ChannelFactors:
        channels = _channels(layer)
        one = jnp.ones((), dtype)
        return ChannelFactors(
            moment=jnp.eye(channels, dtype=dtype),
            mean=jnp.zeros(channels, dtype),
            steps=one,
            level=one,
            bias=_bias_entry(layer, one),
            outputs=jnp.eye(layer.outputs, dtype=dtype),
        )

    def measure(a: Array, g: Array | None, use: Use) -> ChannelFactors:
        channels = _channels(use.layer)
        if a.shape[-1] != channels or a.ndim < 2:
            raise ValueError(
                f"sua: measure got inputs of shape {a.shape}; expected [N, *spatial, {channels}]. "
                "Pass the input map of the convolution, not its patches."
            )
        a = a.astype(use.dtype)
        weights = _per_position(use, a.shape[:-1])
        if g is None:
            rows = use.rows
            outputs = jnp.eye(use.outputs, dtype=use.dtype)
        else:
            g = g.astype(use.dtype)
            rows = math.prod(g.shape[:-1])
            outputs = gram(g, g, precision=precision) / use.rows
        # a column of ones turns the second moments into all that is wanted
        a = homogeneous(a)
        scale = rows / use.examples / math.prod(a.shape[:-1])
        moments = scale * weighted_gram(a, weights, precision=precision)
        moment, mean = moments[:-1, :-1], moments[:-1, -1]
        total = moments[-1, -1]
        # tr(Omega) / p: the trace of the moment for every offset of the kernel, and the bias
        offsets = use.inputs // channels
        trace = offsets * jnp.trace(moment) + int(use.bias) * total
        level = trace / (use.inputs + use.bias)
        bias = _bias_entry(use.layer, total)
        return ChannelFactors(moment, mean, total, level, bias, outputs)

    def factorize(factors: ChannelFactors, damping: Array) -> ChannelInverse:
        steps, mean, covariance = _covariance(factors)
        gamma = factors.outputs
        mean_output = jnp.trace(gamma) / len(gamma)
        shift, output_shift = tikhonov_shifts(factors.level, mean_output, damping)
        shift = shift / steps
        root = inverse_root(covariance, shift)
        inverse = jnp.matmul(root, root.T, precision=precision)
        direction = jnp.matmul(inverse, mean, precision=precision)
        outputs = psd_inverse(after(gamma, root), output_shift)
        spread = jnp.vdot(mean, direction)
        return ChannelInverse(inverse, direction, spread, shift, steps, factors.bias, outputs)

    def solve(inverse: ChannelInverse, v: Array, damping: Array) -> Array:
        features, row = _split(v, inverse)
        # (D + m m^T)^{-1} with D = blockdiag(I (x) (Sigma + s I), s); the bias is eliminated by
        # hand, because 1 / s would cancel against itself
        inner = jnp.einsum("cd,kdq->kcq", inverse.channels, features, precision=precision)
        along = jnp.einsum("c,kcq->q", inverse.direction, features, precision=precision)
        spread = 1 + features.shape[0] * inverse.spread
        if row is None:
            common = along / spread
        else:
            below = inverse.shift * spread + 1
            common = (inverse.shift * along + row) / below
            row = (spread * row - along) / below
        inner = inner - inverse.direction[:, None] * common
        solved = _join(inner, row) / inverse.steps
        return jnp.matmul(solved, inverse.outputs, precision=precision)

    def multiply(factors: ChannelFactors, v: Array) -> Array:
        steps, mean, covariance = _covariance(factors)
        features, row = _split(v, factors)
        common = jnp.einsum("c,kcq->q", mean, features, precision=precision)
        if row is not None:
            common = row = common + row
        inner = jnp.einsum("cd,kdq->kcq", covariance, features, precision=precision)
        inner = inner + mean[:, None] * common
        product = steps * _join(inner, row)
        return jnp.matmul(product, factors.outputs, precision=precision)

    return Block("kronecker (sua)", init, measure, factorize, solve, multiply, raw=True)


def _covariance(factors: ChannelFactors) -> tuple[Array, Array, Array]:
    """`T`, `mu` and `Sigma`; `T` is next to nothing where nothing was measured, as it multiplies
    the bias entry.
    """
    eps = jnp.finfo(factors.steps.dtype).eps
    steps = jnp.where(factors.steps > 0, factors.steps, eps)
    mean = factors.mean / steps
    covariance = factors.moment / steps - jnp.outer(mean, mean)
    return steps, mean, symmetrize(covariance)


def _per_position(use: Use, shape: tuple[int, ...]) -> Array | None:
    """The mean weight of every example, at all positions of its map."""
    if use.weights is None:
        return None
    # weights are those of output positions, of which there may be another number
    outputs = range(1, use.weights.ndim)
    per_example = use.weights.astype(use.dtype).mean(outputs)
    beside = per_example.reshape(-1, *(1,) * (len(shape) - 1))
    return jnp.broadcast_to(beside, shape)


def _split(v: Array, of: ChannelFactors | ChannelInverse) -> tuple[Array, Array | None]:
    """Features `[k, C, q]` and the bias row `[q]`, where the layer has one."""
    channels = of.mean.size if isinstance(of, ChannelFactors) else of.direction.size
    has_bias = of.bias.size > 0
    features = v[:-1] if has_bias else v
    row = v[-1] if has_bias else None
    return features.reshape(-1, channels, v.shape[1]), row


def _join(features: Array, row: Array | None) -> Array:
    flat = features.reshape(-1, features.shape[-1])
    if row is None:
        return flat
    return jnp.concatenate([flat, row[None]])


def _bias_entry(layer: Layer, value: Array) -> Array:
    return jnp.broadcast_to(value, 0 if layer.bias is None else 1)


def _channels(layer: Layer) -> int:
    channels = layer.channels
    if channels < 1 or layer.inputs % channels:
        raise ValueError(
            f"sua: layer {layer.path!r} of kind {layer.kind!r} has {channels} channels and "
            f"{layer.inputs} inputs; expected a plain convolution (no groups, not transposed), "
            "whose inputs are offsets of the kernel times channels. Use kronecker() for other "
            "layers."
        )
    return channels
