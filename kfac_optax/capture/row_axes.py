"""Rows as a site gives them, laid out as its layer needs them."""

import functools
import math

import jax
import jax.numpy as jnp

from kfac_optax._types import Layer
from kfac_optax.capture.geometry import ScaleShift, to_rows
from kfac_optax.capture.sites import Site
from kfac_optax.linalg.gram import homogeneous


def stack_first(
    x: jax.Array,
    site: Site,
    features: int,
) -> jax.Array:
    """Rows `[*scans, *stacked, groups, N, *positions, *features] -> [copies, N, *positions, *steps,
    *features]`.

    The steps in time of a layer are further positions.
    """
    # steps of scans over time behind the positions; what is left in front is copies
    loops = [i for i, (_, over_layers) in enumerate(site.scans) if not over_layers]
    end = x.ndim - features
    behind_positions = range(end - len(loops), end)
    x = jnp.moveaxis(x, loops, behind_positions)
    front = len(site.stack) + 1  # and the groups
    return x.reshape(-1, *x.shape[front:])


def steps_in_a_row(
    x: jax.Array,
    site: Site,
    features: int,
) -> jax.Array:
    """As `stack_first`, all positions and steps on one axis."""
    x = stack_first(x, site, features)
    copies, examples = x.shape[:2]
    last = x.shape[x.ndim - features :]
    return x.reshape(copies, examples, -1, *last)


def without_examples(site: Site, examples: int) -> bool:
    """Whether the rows of a site cannot be divided among the examples: each belongs to all of them.

    Then one row has the sum of the examples' gradients. Its square has products of different
    examples, which cancel only where the terms are independent with mean zero. Rows that depend on
    the arguments and are at least as many as the examples may be the examples', and are taken to
    be.
    """
    return not site.varies or math.prod(site.row_shape) < examples


def differs(site: Site, layer: Layer) -> bool:
    """Whether the rows of a use are those of `rows_of_use`, since uses of its layer differ."""
    return layer.given_rows or (layer.mixed and site.bias is None)


def rows_of_site(
    site: Site,
    layer: Layer,
    a: jax.Array,
    g: jax.Array,
) -> tuple:
    """Rows of a use whose input and gradient have the axes of its scans and stack in front."""
    # one use without the axes in front of it, then mapped over them
    as_rows = functools.partial(to_rows, site.geometry)
    if differs(site, layer):
        as_rows = functools.partial(rows_of_use, site, layer)
    for _ in range(len(site.scans) + site.stacked):
        as_rows = jax.vmap(as_rows)
    return as_rows(a, g)


def rows_of_use(
    site: Site,
    layer: Layer,
    a: jax.Array,
    g: jax.Array | None,
) -> tuple:
    """Rows `[groups, N, *positions, p]`, the bias coordinate among them, and `[..., q]` of one use
    of a layer whose uses differ.

    A use without part in the bias has a zero there. One that multiplies by the transposed weight,
    `s = x W^T`, has `dL/dW = g^T x` for its cotangent `g`: its rows are `g` and `x`. So that inputs
    and gradients of different scale do not mix, all rows of a layer with such a use are divided by
    their length, `a / |a|` and `|a| g`: no outer product changes, and the trace of `A (x) G` is
    that of `(1/N) sum_rows a a^T (x) g g^T`. Without `g` such a use has zeros.
    """
    if isinstance(site.geometry, ScaleShift):
        return _without_shift(*to_rows(site.geometry, a, g))
    # s = x W^T has dL/dW = g^T x: the cotangent is the input side
    rows, gradients = to_rows(site.geometry, a, g)
    if site.swapped:
        if gradients is None:
            shape = (*rows.shape[:-1], layer.inputs)
            rows = jnp.zeros(shape, rows.dtype)
        else:
            rows, gradients = gradients, rows
    # the bias coordinate, zero in a use that has no bias
    if layer.bias is not None:
        rows = homogeneous(rows) if site.bias is not None else _with_zero(rows)
    if layer.swapped and gradients is not None:
        return _balanced(rows, gradients)
    return rows, gradients


def _with_zero(rows: jax.Array) -> jax.Array:
    zeros = jnp.zeros((*rows.shape[:-1], 1), rows.dtype)
    return jnp.concatenate([rows, zeros], -1)


def _balanced(a: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = jnp.promote_types(jnp.result_type(a, g), jnp.float32)
    a, g = a.astype(dtype), g.astype(dtype)
    # in two steps, so that squares of tiny numbers do not vanish
    sizes = jnp.abs(a)
    largest = jnp.max(sizes, -1, keepdims=True, initial=0)
    used = largest > 0  # of padding, zero times what it holds need not be zero
    scaled = a / jnp.where(used, largest, 1)
    square = jnp.sum(scaled**2, -1, keepdims=True)
    norm = jnp.sqrt(square)
    unit = scaled / jnp.where(used, norm, 1)
    return unit, jnp.where(used, g * (largest * norm), 0)


def _without_shift(
    a: jax.Array,
    g: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Rows of a scale without the shift that others of its uses have: two positions in which `g`
    cancels.
    """
    if g is None:
        return a, None
    # a g = (a/2) g + (-a/2)(-g), while g - g = 0
    half = a / 2
    rows = jnp.stack([half, -half], -2)
    return rows, jnp.stack([g, -g], -2)
