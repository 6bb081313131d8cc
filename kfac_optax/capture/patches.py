"""Convolutions as dense layers: the patches that each output position sees, from slices, without a convolution."""

import itertools
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


def offsets(a: jax.Array, window: Window, *, reverse: bool = False) -> list[jax.Array]:
    """For every offset in the window, row by row, the input value that each output position sees: `[..., *out, C]`."""
    n = len(window.size)
    front = a.ndim - n - 1
    spatial = [(low, high, d - 1) for (low, high), d in zip(window.padding, window.input_dilation, strict=True)]
    padded = jax.lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0)] * front + spatial + [(0, 0, 0)])
    out = window.outputs(a.shape)
    slices = []
    for position in itertools.product(*map(range, window.size)):
        if reverse:
            position = tuple(k - 1 - i for i, k in zip(position, window.size, strict=True))
        start = [i * d for i, d in zip(position, window.kernel_dilation, strict=True)]
        stop = [i + (m - 1) * s + 1 for i, m, s in zip(start, out, window.strides, strict=True)]
        slices.append(
            jax.lax.slice(
                padded,
                (0,) * front + tuple(start) + (0,),
                (*padded.shape[:front], *stop, padded.shape[-1]),
                (1,) * front + window.strides + (1,),
            )
        )
    return slices


def unfold(a: jax.Array, window: Window, groups: int = 1, *, reverse: bool = False) -> jax.Array:
    """Patches `[groups, ..., *out, offsets * C / groups]` of a map `[..., *spatial, C]`, channels varying fastest."""
    slices = offsets(a, window, reverse=reverse)
    if groups == 1:
        return jnp.concatenate(slices, -1)[None]
    grouped = jnp.stack([x.reshape(*x.shape[:-1], groups, -1) for x in slices], -2)
    return jnp.moveaxis(grouped.reshape(*grouped.shape[:-2], -1), -2, 0)


def mean_patch(a: jax.Array, window: Window, groups: int = 1, *, reverse: bool = False) -> jax.Array:
    """The mean of all patches of an example, `[groups, ..., offsets * C / groups]`: no patch is formed."""
    axes = tuple(range(-1 - len(window.size), -1))
    means = jnp.stack([x.mean(axes) for x in offsets(a, window, reverse=reverse)], -2)  # [..., offsets, C]
    split = means.reshape(*means.shape[:-1], groups, -1)
    split = jnp.moveaxis(split, -2, 0)  # [groups, ..., offsets, C / groups]
    return split.reshape(*split.shape[:-2], -1)
