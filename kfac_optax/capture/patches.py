"""Convolutions as dense layers: the patches that each output position sees, from slices, without a
convolution.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Window(NamedTuple):
    """Geometry of a convolution; one entry per spatial axis.

    `padding` is applied to the input after `input_dilation` has put zeros between its values; it
    may be negative.
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
            # n values with dilation - 1 zeros between them, padding on both sides; a window reaches
            # (k - 1) spread + 1 of them
            padded = (n - 1) * dilation + 1 + low + high if n else 0
            out.append(max(0, (padded - (k - 1) * spread - 1) // stride + 1))
        return tuple(out)

    def strided(self, step: Sequence[int]) -> "Window":
        """The window at every `step`-th output position."""
        # kernel and dilation stay, the window moves further
        return self._replace(strides=tuple(s * k for s, k in zip(self.strides, step, strict=True)))


def _padded(a: jax.Array, window: Window) -> jax.Array:
    front = a.ndim - len(window.size) - 1
    # (low, high, zeros between): what the convolution would see
    spatial = [
        (low, high, d - 1)
        for (low, high), d in zip(window.padding, window.input_dilation, strict=True)
    ]
    return jax.lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0)] * front + spatial + [(0, 0, 0)])


def _windows(
    a: jax.Array,
    window: Window,
    join: Callable[[list[jax.Array], int], jax.Array],
    reverse: bool,
) -> jax.Array:
    """Joins the views of each axis's offsets,
    `[..., *spatial, groups, C] -> [..., *out, groups, ...]`.

    Axis by axis, since XLA compiles two short concatenations several times faster than one of all
    offsets.
    """
    n = len(window.size)
    out = window.outputs(a.shape[:-1])
    # the last spatial axis first: its offsets vary fastest in a patch, as in a stored kernel
    for i in reversed(range(n)):
        axis = a.ndim - 2 - n + i
        # where each offset of the kernel begins, and how far it moves
        starts = [k * window.kernel_dilation[i] for k in range(window.size[i])]
        extent = (out[i] - 1) * window.strides[i] + 1
        # one strided view for every offset
        parts = [
            jax.lax.slice_in_dim(a, start, start + extent, window.strides[i], axis)
            for start in (starts[::-1] if reverse else starts)
        ]
        a = join(parts, axis)
    return a


def _over_windows(
    a: jax.Array,
    window: Window,
    groups: int,
    join: Callable,
    reverse: bool = False,
) -> jax.Array:
    """`[groups, ..., *out, ...]`, the channels of each group in the place that `join` gives them."""
    # padding and zeros between values are in the array now, so that the window is without them
    padded = _padded(a, window)
    bare = window._replace(
        padding=((0, 0),) * len(window.size), input_dilation=(1,) * len(window.size)
    )
    # [..., *spatial, C] -> [..., *spatial, groups, C / groups], and groups to the front
    made = _windows(padded.reshape(*padded.shape[:-1], groups, -1), bare, join, reverse)
    return made.squeeze(-2)[None] if groups == 1 else jnp.moveaxis(made, -2, 0)


def unfold(
    a: jax.Array,
    window: Window,
    groups: int = 1,
    *,
    reverse: bool = False,
) -> jax.Array:
    """Patches `[groups, ..., *out, offsets * C / groups]` of a map `[..., *spatial, C]`, channels
    varying fastest.
    """
    return _over_windows(a, window, groups, lambda parts, axis: jnp.concatenate(parts, -1), reverse)


def mean_patch(
    a: jax.Array,
    window: Window,
    groups: int = 1,
    *,
    reverse: bool = False,
) -> jax.Array:
    """The mean of all patches of an example, `[groups, ..., offsets * C / groups]`: no patch is
    formed.
    """

    def join(parts: list[jax.Array], axis: int) -> jax.Array:
        # the mean over output positions of every offset, before any patch is formed
        return jnp.concatenate([x.mean(axis, keepdims=True) for x in parts], -1)

    return _over_windows(a, window, groups, join, reverse).squeeze(
        tuple(range(-1 - len(window.size), -1))
    )


def window_sums(a: jax.Array, window: Window, groups: int = 1) -> jax.Array:
    """The sum of all entries of every patch, `[groups, ..., *out]`: no patch is formed."""
    # the sum over channels first: one number for every position and group
    per_group = a.reshape(*a.shape[:-1], groups, -1).sum(-1)
    return _over_windows(per_group, window, groups, lambda parts, axis: sum(parts[1:], parts[0]))[
        ..., 0
    ]
