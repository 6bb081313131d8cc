"""Convolutions with a kernel that is made of others, as convolutions with those."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.capture.kernels.expression import Expression, Names
from kfac_optax.capture.kernels.parts import Multiply


def convolution(
    eqn: Any, kernel: Expression, x: jax.Array, values: Mapping[int, jax.Array]
) -> jax.Array:
    """A `conv_general_dilated` with the kernel."""
    numbers, p = eqn.params["dimension_numbers"], eqn.params
    rank = x.ndim
    # batch, spatial axes, input and output channels, window
    rows, features = tuple(range(rank - 1)), (rank - 1, rank)
    window = tuple(range(rank + 1, 2 * rank - 1))
    of_x = _named(numbers.lhs_spec, (rows[0], features[0], *rows[1:]))
    of_kernel = _named(numbers.rhs_spec, (features[1], features[0], *window))
    out = _named(numbers.out_spec, (rows[0], features[1], *rows[1:]))
    kept = ("window_strides", "lhs_dilation", "rhs_dilation", "feature_group_count")
    kept += ("batch_group_count", "precision", "preferred_element_type")
    options = {key: p[key] for key in kept}

    def einsum(
        padding: tuple, x: jax.Array, of_x: Names, m: jax.Array, of_m: Names, out: Names
    ) -> jax.Array:
        if not set(window) & set(of_m):
            chosen = {key: p[key] for key in ("precision", "preferred_element_type")}
            return jnp.einsum(x, of_x, m, of_m, out, **chosen)
        # the channels may be those between two products
        (inputs,) = set(of_x) & set(of_m)
        (outputs,) = set(of_m) - {inputs, *window}
        sides = (of_x, inputs, rows), (out, outputs, rows)
        lhs, made = ((n.index(r[0]), n.index(c), *map(n.index, r[1:])) for n, c, r in sides)
        rhs = (of_m.index(outputs), of_m.index(inputs), *map(of_m.index, window))
        axes = jax.lax.ConvDimensionNumbers(lhs, rhs, made)
        more = options | {"padding": padding}
        return jax.lax.conv_general_dilated(x, m, dimension_numbers=axes, **more)

    # channels of groups stay together
    fixed = window if p["feature_group_count"] == 1 else (*window, *features)
    fresh = itertools.count(2 * rank)

    def with_padding(padding: tuple) -> Multiply:
        def part(name: int, before: int, after: int) -> Multiply | None:
            if name not in window:
                return None
            # a part of the window begins later and ends earlier, by its own dilation
            i = window.index(name)
            (low, high), spread = padding[i], p["rhs_dilation"][i]
            cropped = (low - before * spread, high - after * spread)
            return with_padding((*padding[:i], cropped, *padding[i + 1 :]))

        return Multiply(values, functools.partial(einsum, padding), fresh, fixed, part)

    return with_padding(tuple(p["padding"]))(x, of_x, kernel, of_kernel, out)


def _named(places: Sequence[int], names: Sequence[int]) -> Names:
    """The names in the order of the axes, given the axis of each."""
    found = dict(zip(places, names, strict=True))
    return tuple(found[axis] for axis in range(len(places)))
