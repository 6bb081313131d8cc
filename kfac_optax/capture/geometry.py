"""What each kind of layer computes, and how its input and output gradient become rows of a dense
layer.

Every layer is brought to `s = a_rows @ matrix` with rows `[groups, N, *positions, p]`. Axes in
front of those that a geometry knows (added by `vmap` over examples, say) are rows too, so all axes
are counted from the end.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._types import Staircase
from kfac_optax.capture import patches


@dataclasses.dataclass(frozen=True)
class Dense:
    """`s = a @ kernel`, `a [*rows, p]`, `kernel [p, q]`, of which `mask` says which entries are used."""

    mask: Staircase | None = None

    @property
    def kind(self) -> str:
        """`"masked"` where it has a mask."""
        return "dense" if self.mask is None else "masked"


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
    in space. `mask` is that of the kernel as a matrix, its window and channels flattened.
    """

    window: patches.Window
    groups: int = 1
    flipped: bool = False
    mask: Staircase | None = None

    @property
    def kind(self) -> str:
        """`"masked"` where it has a mask."""
        return "conv" if self.mask is None else "masked"

    def plain_channels(self, kernel: Sequence[int]) -> int:
        """Input channels, where every output position sees a window of the input as it is; else 0."""
        # SUA takes moments of the input map, which must be what every window sees
        undilated = set(self.window.input_dilation) == {1}
        plain = self.groups == 1 and not self.flipped and undilated and self.mask is None
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


def rows_shape(
    geometry: Geometry,
    a: Sequence[int],
    s: Sequence[int],
) -> tuple[int, ...]:
    """`(N, *positions)` of one use with input `a` and output `s`."""
    match geometry:
        case Lookup():
            return tuple(a)
        case Contraction():
            # axes in front, of `vmap` over examples say, are rows too
            front = len(a) - len(geometry.a)
            rows = [a[axis] for axis in geometry.a[: geometry.rows]]
            # a product without rows is one row
            return (*a[:front], *rows) or (1,)
        case Rows():
            return tuple(a[1:-1])
        case ScaleShift():
            rank = len(s)
            return tuple(n for i, n in enumerate(s) if i - rank not in geometry.axes)
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
            of_rows, of_window = step[: front - 1], step[front - 1 :]
            g = _if_any(g, _every, 0, step)
            a, window = _every(a, 0, of_rows), window.strided(of_window)
        unfolded = patches.unfold(a, window, geometry.groups, reverse=geometry.flipped)
        return unfolded, _if_any(g, split_last, geometry.groups)
    # [groups, N, *positions, p or q]
    a, g = plain_rows(geometry, a, g)
    if step is None:
        return a, g
    return _every(a, 1, step), _if_any(g, _every, 1, step)


def thinning(positions: Sequence[int], keep: int | None) -> tuple[int, ...] | None:
    """Steps along each axis of positions that leave about `keep` of them, `None` where nothing is
    to be left out.
    """
    total = math.prod(positions)
    if keep is None or total <= keep:
        return None
    # the same step along every axis, so that about total / step^axes are left
    share = total / keep
    step = math.ceil(share ** (1 / len(positions)))
    return tuple(min(step, n) for n in positions)


def _every(
    x: jax.Array,
    first: int,
    step: Sequence[int],
) -> jax.Array:
    # groups or examples in front stay
    whole = (slice(None),) * (first + 1)
    thinned = tuple(slice(None, None, k) for k in step)
    return x[whole + thinned]


def _if_any(
    g: jax.Array | None,
    function: Callable[..., jax.Array],
    *args: Any,
) -> Any:
    """A function of output gradients, where there are some."""
    return None if g is None else function(g, *args)


def plain_rows(
    geometry: Geometry,
    a: jax.Array,
    g: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """`to_rows` of what is no convolution, at every position."""
    match geometry:
        case Contraction():
            rows, groups = geometry.rows, geometry.groups
            a = _grouped(a, geometry.a, rows, groups)
            return a, _if_any(g, _grouped, geometry.s, rows, groups)
        case Rows():
            return a, g
        case ScaleShift():
            a = _channels_last(a, geometry.axes)
            return a, _if_any(g, _channels_last, geometry.axes)
        case _:
            # one group
            return a[None], _if_any(g, lambda x: x[None])


def _grouped(
    x: jax.Array,
    axes: Sequence[int],
    rows: int,
    groups: int,
) -> jax.Array:
    """Axes to the order groups, rows in front of them, features; groups and features flattened."""
    front = x.ndim - len(axes)
    # [front, rows, groups, features], whatever the order in the array
    known = [x.ndim + axis for axis in axes]
    x = x.transpose(*range(front), *known)
    first_group = front + rows
    lead = x.shape[:first_group] or (1,)
    middle = x.shape[first_group : first_group + groups]
    # a product without rows has one, without groups one
    x = x.reshape(*lead, math.prod(middle), -1)
    return jnp.moveaxis(x, -2, 0)


def _channels_last(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    # the axes of scale and shift behind all others, flattened
    last = [x.ndim + axis for axis in axes]
    rest = [i for i in range(x.ndim) if i not in last]
    rows = [x.shape[i] for i in rest]
    flat = x.transpose(*rest, *last).reshape(*rows, -1)
    return flat[None]


def split_last(g: jax.Array, groups: int) -> jax.Array:
    """Outputs of every group apart, `[..., q] -> [groups, ..., q / groups]`."""
    if groups == 1:
        return g[None]
    # [..., q] -> [..., groups, q / groups] -> groups first
    split = g.reshape(*g.shape[:-1], groups, -1)
    return jnp.moveaxis(split, -2, 0)
