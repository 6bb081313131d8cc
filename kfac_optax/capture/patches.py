"""Convolutions as dense layers: the patches that each output position sees, from slices, without a convolution."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Window(NamedTuple):
    """Geometry of a convolution; one entry per spatial axis.

    `padding` is applied to the input after `input_dilation` has put zeros between its values; it may be negative.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    def outputs(self, a: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the output for an input of shape `[..., *spatial, C]`."""
        spatial = a[-1 - len(self.size) : -1]
        out = []
        for n, k, stride, (low, high), dilation, spread in zip(spatial, *self, strict=True):
            padded = (n - 1) * dilation + 1 + low + high if n else 0
            out.append(max(0, (padded - (k - 1) * spread - 1) // stride + 1))
        return tuple(out)

    def strided(self, step: Sequence[int]) -> "Window":
        """The window at every `step`-th output position."""
        return self._replace(strides=tuple(s * k for s, k in zip(self.strides, step, strict=True)))


def _padded(a: jax.Array, window: Window) -> jax.Array:
    front = a.ndim - len(window.size) - 1
    spatial = [(low, high, d - 1) for (low, high), d in zip(window.padding, window.input_dilation, strict=True)]
    return jax.lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0)] * front + spatial + [(0, 0, 0)])


def _windows(a: jax.Array, window: Window, *, reverse: bool, mean: bool) -> jax.Array:
    """Axis by axis, since XLA compiles two short concatenations several times faster than one of all offsets.

    `[..., *spatial, groups, C] -> [..., *out, groups, offsets * C]`, with the mean over an output axis in its place.
    """
    n = len(window.size)
    out = window.outputs(a.shape[:-1])
    for i in reversed(range(n)):
        axis = a.ndim - 2 - n + i
        starts = [k * window.kernel_dilation[i] for k in range(window.size[i])]
        extent = (out[i] - 1) * window.strides[i] + 1
        parts = [
            jax.lax.slice_in_dim(a, start, start + extent, window.strides[i], axis)
            for start in (starts[::-1] if reverse else starts)
        ]
        a = jnp.concatenate([x.mean(axis, keepdims=True) for x in parts] if mean else parts, -1)
    return a


def _unfolded(a: jax.Array, window: Window, groups: int, *, reverse: bool, mean: bool) -> jax.Array:
    padded = _padded(a, window)
    bare = window._replace(padding=((0, 0),) * len(window.size), input_dilation=(1,) * len(window.size))
    grouped = padded.reshape(*padded.shape[:-1], groups, -1)
    made = _windows(grouped, bare, reverse=reverse, mean=mean)
    return made.squeeze(-2)[None] if groups == 1 else jnp.moveaxis(made, -2, 0)


def unfold(a: jax.Array, window: Window, groups: int = 1, *, reverse: bool = False) -> jax.Array:
    """Patches `[groups, ..., *out, offsets * C / groups]` of a map `[..., *spatial, C]`, channels varying fastest."""
    return _unfolded(a, window, groups, reverse=reverse, mean=False)


def mean_patch(a: jax.Array, window: Window, groups: int = 1, *, reverse: bool = False) -> jax.Array:
    """The mean of all patches of an example, `[groups, ..., offsets * C / groups]`: no patch is formed."""
    made = _unfolded(a, window, groups, reverse=reverse, mean=True)
    return made.squeeze(tuple(range(-1 - len(window.size), -1)))
