"""Convolutions that are dense layers in a way of their own: those whose output wraps around, and
those with another kernel at every position.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax.capture.geometry import Contraction, Conv


def wrapped(inputs: jax.Array, plain: Conv) -> tuple[jax.Array, Conv]:
    """A transposed convolution with circular padding, as one of an input that is repeated.

    Flax computes the whole output, centres it in an odd number of periods and adds those up. With
    `P` the period, `x` the input with zeros between its values and `b` what is put in front of the
    whole output, that is `z[u] = sum_j w[j] x[(u - b + j - (k - 1)) mod P]`, a convolution of the
    periodic input.

    Args:
      inputs: `[..., *spatial, C]`.
      plain: the transposed convolution with `padding="VALID"`.
    """
    window, front = plain.window, inputs.ndim - len(plain.window.size) - 1
    padding = []
    axes = zip(window.outputs(inputs.shape), *window, strict=True)
    for axis, (made, size, _, (low, _), dilation, spread) in enumerate(axes, start=front):
        n = inputs.shape[axis]
        period, reach = n * dilation, (size - 1) * spread + 1
        rest = -(made - period) % (2 * period)
        # the odd one of both sides is in front, but for the exact transpose of a convolution
        before = rest // 2 if plain.flipped else (rest + 1) // 2
        # so many values of the periods before, of which the first may be zeros alone
        values = -(-(low + before) // dilation)
        start = low + before - values * dilation
        length = period - 1 + reach - start
        count = (length - 1) // dilation + 1
        inputs = jnp.take(inputs, (np.arange(count) - values) % n, axis)
        padding.append((start, length - (count - 1) * dilation - 1))
    return inputs, Conv(window._replace(padding=tuple(padding)), 1, plain.flipped)


def unshared(
    inputs: jax.Array,
    spatial: int,
    options: dict[str, Any],
    filter_shape: Sequence[int],
) -> tuple[jax.Array, Contraction]:
    """A kernel for every position, `[*out, C * offsets, q]`: as many dense layers, each of which sees
    one patch of an example.

    Args:
      inputs: `[..., *spatial, C]`.
      spatial: how many axes are spatial.
      options: of `jax.lax.conv_general_dilated_patches`.
      filter_shape: of the window.
    """
    lead = inputs.shape[: inputs.ndim - spatial - 1]
    letters = "abcdefgh"[:spatial]
    names = f"N{letters}C", f"{letters}IO", f"N{letters}C"
    flat = inputs.reshape(-1, *inputs.shape[len(lead) :])
    # channels vary slowest, as in the kernel; a copy of numbers, whatever makes it
    patches = jax.lax.conv_general_dilated_patches(
        flat, filter_shape, dimension_numbers=names, precision=jax.lax.Precision.HIGHEST, **options
    )
    a = patches.reshape(*lead, *patches.shape[1:])
    # a [rows, positions, inputs], s [rows, positions, outputs], kernel [positions, inputs, outputs]
    rank = a.ndim
    order = tuple(range(-rank, 0))
    return a, Contraction(
        a=order,
        s=order,
        kernel=tuple(range(-spatial - 2, 0)),
        rows=len(lead),
        groups=spatial,
        inputs=1,
        outputs=1,
    )
