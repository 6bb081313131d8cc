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
        axes = zip(spatial, *self, strict=True)
        for n, size, stride, (low, high), dilation, spread in axes:
            # n values with dilation - 1 zeros between them, padding on both sides; a window reaches
            # (k - 1) spread + 1 of them
            padded = 0
            if n:
                padded = (n - 1) * dilation + 1 + low + high
            reach = (size - 1) * spread + 1
            positions = (padded - reach) // stride + 1
            out.append(max(0, positions))
        return tuple(out)

    def strided(self, step: Sequence[int]) -> "Window":
        """The window at every `step`-th output position."""
        # kernel and dilation stay, the window moves further
        pairs = zip(self.strides, step, strict=True)
        strides = tuple(stride * every for stride, every in pairs)
        return self._replace(strides=strides)


def _padded(a: jax.Array, window: Window) -> jax.Array:
    front = a.ndim - len(window.size) - 1
    # (low, high, zeros between): what the convolution would see
    pairs = zip(window.padding, window.input_dilation, strict=True)
    spatial = [(low, high, dilation - 1) for (low, high), dilation in pairs]
    as_it_is = (0, 0, 0)
    config = [as_it_is] * front + spatial + [as_it_is]
    zero = jnp.zeros((), a.dtype)
    return jax.lax.pad(a, zero, config)


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
    outputs = window.outputs(a.shape[:-1])
    # the last spatial axis first: its offsets vary fastest in a patch, as in a stored kernel
    for i in reversed(range(n)):
        axis = a.ndim - 2 - n + i
        # where each offset of the kernel begins, and how far it moves
        stride, dilation = window.strides[i], window.kernel_dilation[i]
        starts = [k * dilation for k in range(window.size[i])]
        if reverse:
            starts.reverse()
        extent = (outputs[i] - 1) * stride + 1
        # one strided view for every offset
        parts = []
        for k in starts:
            part = jax.lax.slice_in_dim(a, k, k + extent, stride, axis)
            parts.append(part)
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
    n = len(window.size)
    nothing = (0, 0)
    bare = window._replace(padding=(nothing,) * n, input_dilation=(1,) * n)
    # [..., *spatial, C] -> [..., *spatial, groups, C / groups], and groups to the front
    grouped = padded.reshape(*padded.shape[:-1], groups, -1)
    made = _windows(grouped, bare, join, reverse)
    if groups == 1:
        one = made.squeeze(-2)
        return one[None]
    return jnp.moveaxis(made, -2, 0)


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

    def join(parts: list[jax.Array], axis: int) -> jax.Array:
        return jnp.concatenate(parts, -1)

    return _over_windows(a, window, groups, join, reverse)


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
        means = [x.mean(axis, keepdims=True) for x in parts]
        return jnp.concatenate(means, -1)

    means = _over_windows(a, window, groups, join, reverse)
    positions = tuple(range(-1 - len(window.size), -1))
    return means.squeeze(positions)


def window_sums(
    a: jax.Array,
    window: Window,
    groups: int = 1,
) -> jax.Array:
    """The sum of all entries of every patch, `[groups, ..., *out]`: no patch is formed."""
    # the sum over channels first: one number for every position and group
    grouped = a.reshape(*a.shape[:-1], groups, -1)
    per_group = grouped.sum(-1)

    def join(parts: list[jax.Array], axis: int) -> jax.Array:
        return sum(parts[1:], parts[0])

    sums = _over_windows(per_group, window, groups, join)
    return sums[..., 0]
