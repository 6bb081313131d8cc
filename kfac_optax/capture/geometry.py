"""What each kind of layer computes, and how its input and output gradient become rows of a dense
layer.

Every layer is brought to `s = a_rows @ matrix` with rows `[groups, N, *positions, p]`. Axes in
front of those that a geometry knows (added by `vmap` over examples, say) are rows too, so all axes
are counted from the end.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kfac_optax.capture import patches
from kfac_optax.linalg.gram import homogeneous


@dataclasses.dataclass(frozen=True)
class Dense:
    """`s = a @ kernel`, `a [*rows, p]`, `kernel [p, q]`."""

    kind = "dense"


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product of `a` and `kernel` over several axes, with axes of the kernel that batch it
    (`groups`).

    Attributes:
      a, s, kernel: axes of each array, counted from the end, in the order rows, groups, inputs (or
        groups, outputs).
      rows, groups, inputs, outputs: number of axes of each sort. Axes of length one may be missing
        in `a` or `s`, or be there in addition.
      kind: `"dense"` where there is one axis of each sort and no group.
    """

    a: tuple[int, ...]
    s: tuple[int, ...]
    kernel: tuple[int, ...]
    rows: int
    groups: int
    inputs: int
    outputs: int
    kind: str = "einsum"


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of channels-last maps, `a [N, *spatial, C]`, `kernel [*window, C / groups, q]`.

    `flipped`: the kernel is stored for the transposed convolution, `[*window, q, C]` and reversed
    in space.
    """

    window: patches.Window
    groups: int = 1
    flipped: bool = False
    kind = "conv"

    def plain_channels(self, kernel: Sequence[int]) -> int:
        """Input channels, where every output position sees a window of the input as it is; else 0."""
        # SUA takes moments of the input map, which must be what every window sees
        plain = self.groups == 1 and not self.flipped and set(self.window.input_dilation) == {1}
        return kernel[-2] if plain else 0


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows of a table `[vocabulary, q]` by integer tokens `a [*rows]`."""

    vocabulary: int
    kind = "embedding"


@dataclasses.dataclass(frozen=True)
class ScaleShift:
    """`s = a * scale + shift` after a normalisation; `axes` (from the end) are those of scale and
    shift.
    """

    axes: tuple[int, ...] = (-1,)
    kind = "scale_shift"


@dataclasses.dataclass(frozen=True)
class Rows:
    """What has been brought to rows already, `[groups, N, *positions, p or q]`."""

    kind = "rows"


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """A layer whose parameters cannot be covered; the reason goes into the coverage table."""

    reason: str
    kind = "unsupported"


Geometry = Dense | Contraction | Conv | Lookup | ScaleShift | Rows | Unsupported


def rows_shape(geometry: Geometry, a: Sequence[int], s: Sequence[int]) -> tuple[int, ...]:
    """`(N, *positions)` of one use with input `a` and output `s`."""
    match geometry:
        case Lookup():
            return tuple(a)
        case Contraction():
            # axes in front, of `vmap` over examples say, are rows too
            front = len(a) - len(geometry.a)
            # a product without rows is one row
            return (*a[:front], *(a[axis] for axis in geometry.a[: geometry.rows])) or (1,)
        case Rows():
            return tuple(a[1:-1])
        case ScaleShift():
            return tuple(n for i, n in enumerate(s) if i - len(s) not in geometry.axes)
        case _:
            return tuple(s[:-1])


def to_rows(
    geometry: Geometry,
    a: jax.Array,
    g: jax.Array | None,
    step: Sequence[int] | None = None,
) -> tuple:
    """Input rows `[groups, N, *positions, p]` and output gradients `[groups, N, *positions, q]`.

    Tokens of a look-up stay `[1, N, *positions]`, no gradient stays `None`. Rows are taken at every
    `step`-th position along each axis.
    """
    if isinstance(geometry, Conv):
        window = geometry.window
        # some of the output positions only: larger strides, and the same positions of g
        if step is not None:
            front = a.ndim - len(window.size) - 1
            g = None if g is None else _every(g, 0, step)
            a, window = _every(a, 0, step[: front - 1]), window.strided(step[front - 1 :])
        unfolded = patches.unfold(a, window, geometry.groups, reverse=geometry.flipped)
        return unfolded, None if g is None else _split_last(g, geometry.groups)
    # [groups, N, *positions, p or q]
    a, g = _plain_rows(geometry, a, g)
    if step is None:
        return a, g
    return _every(a, 1, step), None if g is None else _every(g, 1, step)


def thinning(positions: Sequence[int], keep: int | None) -> tuple[int, ...] | None:
    """Steps along each axis of positions that leave about `keep` of them, `None` where nothing is
    to be left out.
    """
    total = math.prod(positions)
    if keep is None or total <= keep:
        return None
    # the same step along every axis, so that about total / step^axes are left
    step = math.ceil((total / keep) ** (1 / len(positions)))
    return tuple(min(step, n) for n in positions)


def _every(x: jax.Array, first: int, step: Sequence[int]) -> jax.Array:
    return x[(slice(None),) * (first + 1) + tuple(slice(None, None, k) for k in step)]


def _plain_rows(
    geometry: Geometry, a: jax.Array, g: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    match geometry:
        case Contraction():
            n = geometry.rows
            a = _grouped(a, geometry.a, n, geometry.groups)
            return a, None if g is None else _grouped(g, geometry.s, n, geometry.groups)
        case Rows():
            return a, g
        case ScaleShift():
            return _channels_last(a, geometry.axes)[None], None if g is None else _channels_last(
                g, geometry.axes
            )[None]
        case _:
            return a[None], None if g is None else g[None]


def _grouped(
    x: jax.Array,
    axes: Sequence[int],
    rows: int,
    groups: int,
) -> jax.Array:
    """Axes to the order groups, rows in front of them, features; groups and features flattened."""
    front = x.ndim - len(axes)
    # [front, rows, groups, features], whatever the order in the array
    x = x.transpose(*range(front), *(x.ndim + axis for axis in axes))
    lead, middle = x.shape[: front + rows] or (1,), x.shape[front + rows : front + rows + groups]
    # a product without rows has one, without groups one
    x = x.reshape(*lead, math.prod(middle), -1)
    return jnp.moveaxis(x, -2, 0)


def _channels_last(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    # the axes of scale and shift behind all others, flattened
    last = [x.ndim + axis for axis in axes]
    rest = [i for i in range(x.ndim) if i not in last]
    return x.transpose(*rest, *last).reshape(*(x.shape[i] for i in rest), -1)


def _split_last(g: jax.Array, groups: int) -> jax.Array:
    if groups == 1:
        return g[None]
    return jnp.moveaxis(g.reshape(*g.shape[:-1], groups, -1), -2, 0)


def reduced(
    geometry: Geometry,
    a: jax.Array,
    g: jax.Array | None,
    weights: jax.Array | None,
) -> tuple:
    """Inputs averaged and output gradients added over the positions of each example,
    `[groups, N, 1, p or q]`.

    With weights `[N, *positions]` the average is a weighted one. The third value is the weight of
    each example.
    """
    if isinstance(geometry, Conv) and weights is None:  # the mean of patches needs no unfolding
        # [groups, N, p] -> [groups, N, 1, p]
        mean = patches.mean_patch(a, geometry.window, geometry.groups, reverse=geometry.flipped)
        g = None if g is None else _split_last(g, geometry.groups)
        return mean[:, :, None], None if g is None else _sum_positions(g), None
    a, g = to_rows(geometry, a, g)
    # all positions; groups and examples are in front of them
    axes = tuple(range(2, a.ndim - 1))
    total = None if g is None else _sum_positions(g)
    if weights is None:
        return a.mean(axes)[:, :, None], total, None
    per_example = weights.reshape(len(weights), -1).sum(1)
    # sum_t w_t a_t / sum_t w_t; where nothing counts, zero
    share = weights / jnp.where(per_example > 0, per_example, 1).reshape(
        -1, *(1,) * (weights.ndim - 1)
    )
    mean = jnp.where(share[..., None] > 0, a * share[..., None], 0).sum(axes)
    return mean[:, :, None], total, (per_example / math.prod(weights.shape[1:]))[:, None]


def _sum_positions(g: jax.Array) -> jax.Array:
    return g.sum(tuple(range(2, g.ndim - 1)))[:, :, None]


def over_output(geometry: Geometry, weights: jax.Array, rank: int) -> jax.Array:
    """Weights of rows `[N, *positions]` laid out so that they broadcast with a layer's output of
    that rank.
    """
    match geometry:
        # weights have no axis for the channels: length one there
        case ScaleShift():
            return jnp.expand_dims(weights, [rank + axis for axis in geometry.axes])
        case Contraction():
            # axes of the output in the order rows, groups, outputs; then back to its own order
            order = [*range(rank - len(geometry.s)), *(rank + axis for axis in geometry.s)]
            weights = weights.reshape(*weights.shape, *(1,) * (rank - weights.ndim))
            return weights.transpose([order.index(axis) for axis in range(rank)])
        case _:
            return weights[..., None]


def channel_sums(
    geometry: Geometry,
    a: jax.Array,
    g: jax.Array,
    bias: bool,
    dtype: jnp.dtype,
) -> tuple:
    """Sums of all entries of every input row (its bias coordinate included) and gradient row,
    `[groups, N, *positions]`.
    """
    if isinstance(geometry, Conv):
        # sum_j a_j over a patch, plus the one of the bias coordinate
        alpha = patches.window_sums(a.astype(dtype), geometry.window, geometry.groups)
        return alpha + bias, jnp.sum(_split_last(g, geometry.groups), -1, dtype=dtype)
    rows, gradients = _plain_rows(geometry, a, g)
    assert gradients is not None
    # a one-hot row sums to one
    one_hot = isinstance(geometry, Lookup)
    alpha = jnp.ones(rows.shape, dtype) if one_hot else jnp.sum(rows, -1, dtype=dtype)
    return alpha + bias, jnp.sum(gradients, -1, dtype=dtype)


def bias_rows(
    geometry: Geometry,
    a: jax.Array,
    g: jax.Array,
    bias: bool,
    dtype: jnp.dtype,
) -> tuple:
    """As `channel_sums`, the rows themselves: `[groups, N, *positions, p]` and
    `[groups, N, *positions, q]`.
    """
    rows, gradients = to_rows(geometry, a, g)
    rows = rows.astype(dtype)
    return homogeneous(rows) if bias else rows, gradients.astype(dtype)
