"""Helpers shared by the likelihoods: checks, precision, masking."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def has_shape(x: Any) -> bool:
    """True for arrays, tracers and shape structs; False for the placeholders of pytree code."""
    return isinstance(getattr(x, "shape", None), tuple)


def check_weights(
    name: str,
    *,
    weights: Any,
    batch_shape: tuple[int, ...],
    advice: str,
) -> None:
    """Raises ValueError unless `weights` has one entry per term (or is no array at all)."""
    if has_shape(weights) and weights.shape != batch_shape:
        raise ValueError(
            f"{name}: weights have shape {weights.shape}, expected the batch shape {batch_shape}. "
            f"Pass one weight per term, or weights=None. {advice}"
        )


def check_real(name: str, **arrays: Any) -> None:
    """Raises TypeError for complex arrays: the Fisher is that of real numbers, and would come out
    with wrong signs.
    """
    for field, x in arrays.items():
        # conjugates would be missing in every product
        if has_shape(x) and jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise TypeError(
                f"{name}: {field} is {x.dtype}{list(x.shape)}; expected real numbers. Give the "
                "head real and imaginary part as two real outputs, for example "
                "Normal(jnp.stack([z.real, z.imag], -1)) for a complex output z, or LogAmplitude(z) "
                "where z is the logarithm of a wave function."
            )


def check_targets(
    name: str,
    *,
    targets: Any,
    shape: tuple[int, ...],
) -> None:
    """Raises ValueError instead of letting [n] targets broadcast against [n, 1] outputs."""
    # [n] against [n, 1] would broadcast to [n, n] without a word
    if jnp.shape(targets) != shape:
        raise ValueError(
            f"{name}: targets have shape {jnp.shape(targets)}, expected {shape}. "
            f"Reshape the targets; they are never broadcast."
        )


def check_other(mine: Any, other: Any) -> None:
    """Raises unless `other` is a prediction of the same kind for the same terms."""
    name = type(mine).__name__
    if type(other) is not type(mine):
        raise TypeError(
            f"{name}.kl: other is a {type(other).__name__}, expected a {name}: only two predictions "
            "of one kind are compared in closed form."
        )
    got, expected = other.natural[0].shape, mine.natural[0].shape
    # of the same terms, one by one
    if (got, other.batch_shape) != (expected, mine.batch_shape):
        raise ValueError(
            f"{name}.kl: other has shape {got} with the batch {other.batch_shape}, expected "
            f"{expected} with {mine.batch_shape}; they are never broadcast."
        )


def no_closed_form(mine: Any) -> TypeError:
    """What a likelihood without an exact divergence raises."""
    return TypeError(
        f"{type(mine).__name__}.kl: it has no closed form; expected Categorical, Bernoulli or "
        "Normal. Estimate it: the mean of other.nll(y) - this.nll(y) over y = this.sample(key)."
    )


def split_axes(
    name: str,
    *,
    array: Any,
    batch_ndim: int,
    event_ndim: int | None,
) -> tuple[int, int | None]:
    """Returns consistent (batch_ndim, event_ndim) of an array [*batch, *event].

    The number of event axes is what a likelihood remembers: `vmap` and `scan` add or remove
    leading axes, and the trailing ones keep their meaning.
    """
    # placeholders of pytree code keep what they say
    if not has_shape(array):
        return batch_ndim, event_ndim
    ndim = len(array.shape)
    # event axes are counted from the end, so that `vmap` may add or remove others
    if event_ndim is not None:
        return max(ndim - event_ndim, 0), event_ndim
    if not 0 <= batch_ndim <= ndim:
        raise ValueError(
            f"{name}: batch_ndim is {batch_ndim}, expected between 0 and {ndim} for an array of "
            f"shape {array.shape}. Pass the number of leading axes that are the batch."
        )
    return batch_ndim, ndim - batch_ndim


def event_sum(x: jax.Array, *, batch_ndim: int) -> jax.Array:
    """Sums the event axes: [*batch, *event] -> [*batch]."""
    event = tuple(range(batch_ndim, x.ndim))
    return jnp.sum(x, axis=event)


def unit(column: int | jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    """Boolean array of `shape`, True at flat position `column` (which may be traced)."""
    positions = jnp.arange(math.prod(shape))
    return (positions == column).reshape(shape)


def widen(x: jax.Array) -> jax.Array:
    """Casts to float32 unless already wider, so that half precision never enters a log or exp."""
    wide = jnp.promote_types(jnp.result_type(x), jnp.float32)
    return jnp.asarray(x, wide)


def mask_out(
    x: jax.Array,
    *,
    weights: Any,
    fill: float,
) -> jax.Array:
    """Puts `fill` where the weight is zero.

    Masking the inputs of `nll`, not its value, keeps NaN out of every gradient, that in the weights
    included (a zero cotangent times NaN is NaN).
    """
    if weights is None:
        return x
    # [*batch] -> [*batch, 1, ...] beside the event axes
    keep = jnp.asarray(weights) != 0
    missing = (1,) * (jnp.ndim(x) - keep.ndim)
    keep = keep.reshape(keep.shape + missing)
    return jnp.where(keep, x, jnp.asarray(fill, jnp.result_type(x)))


def weighted_mean(nll: jax.Array, *, weights: Any) -> jax.Array:
    """Returns sum(w * nll) / sum(w) of finite terms; 0 for zero weights or an empty batch."""
    # a batch of padding alone has the mean zero, not 0 / 0
    w = jnp.ones_like(nll)
    if weights is not None:
        w = jnp.asarray(weights, nll.dtype)
    w = jnp.broadcast_to(w, nll.shape)
    total = jnp.sum(w)
    mean = jnp.sum(w * nll) / jnp.where(total != 0, total, 1)
    return jnp.where(total != 0, mean, 0)
