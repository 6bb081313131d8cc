"""Convolutions with a kernel that is made of others, as convolutions with those."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.capture.kernels.expression import Expression, Names
from kfac_optax.capture.kernels.parts import Multiply

# of a convolution, besides its padding, that stay for convolutions with parts of the kernel
_OPTIONS = (
    "window_strides",
    "lhs_dilation",
    "rhs_dilation",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
)


def convolution(
    eqn: Any, kernel: Expression, x: jax.Array, values: Mapping[int, jax.Array]
) -> jax.Array:
    """A `conv_general_dilated` with the kernel."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    # names: batch, spatial axes, input and output channels, window
    rank = x.ndim
    batch, *spatial = range(rank - 1)
    into, made = rank - 1, rank
    window = tuple(range(rank + 1, 2 * rank - 1))
    of_x = _named(numbers.lhs_spec, (batch, into, *spatial))
    of_kernel = _named(numbers.rhs_spec, (made, into, *window))
    out = _named(numbers.out_spec, (batch, made, *spatial))
    options = {key: p[key] for key in _OPTIONS}

    def einsum(
        padding: tuple, x: jax.Array, of_x: Names, m: jax.Array, of_m: Names, out: Names
    ) -> jax.Array:
        if not set(window) & set(of_m):
            chosen = {key: p[key] for key in ("precision", "preferred_element_type")}
            return jnp.einsum(x, of_x, m, of_m, out, **chosen)
        # the channels may be those between two products
        (inputs,) = set(of_x) & set(of_m)
        (outputs,) = set(of_m) - {inputs, *window}
        # (batch, channels, *spatial axes) of x and the output, (outputs, inputs, *window) of M
        lhs = _places((batch, inputs, *spatial), of_x)
        rhs = _places((outputs, inputs, *window), of_m)
        result = _places((batch, outputs, *spatial), out)
        axes = jax.lax.ConvDimensionNumbers(lhs, rhs, result)
        more = options | {"padding": padding}
        return jax.lax.conv_general_dilated(x, m, dimension_numbers=axes, **more)

    # channels of groups stay together
    grouped = p["feature_group_count"] > 1
    fixed = (*window, into, made) if grouped else window
    fresh = itertools.count(2 * rank)

    def with_padding(padding: tuple) -> Multiply:
        def part(name: int, before: int, after: int) -> Multiply | None:
            if name not in window:
                return None
            # a part of the window begins later and ends earlier, by its own dilation
            i = window.index(name)
            low, high = padding[i]
            spread = p["rhs_dilation"][i]
            cropped = (low - before * spread, high - after * spread)
            return with_padding((*padding[:i], cropped, *padding[i + 1 :]))

        padded = functools.partial(einsum, padding)
        return Multiply(values, padded, fresh, fixed, part)

    multiply = with_padding(tuple(p["padding"]))
    return multiply(x, of_x, kernel, of_kernel, out)


def _named(places: Sequence[int], names: Sequence[int]) -> Names:
    """The names in the order of the axes, given the axis of each."""
    found = dict(zip(places, names, strict=True))
    return tuple(found[axis] for axis in range(len(places)))


def _places(wanted: Sequence[int], names: Names) -> tuple[int, ...]:
    """Where axes of these names are."""
    return tuple(names.index(name) for name in wanted)
