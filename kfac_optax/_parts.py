"""What no layer has of parameters that layers share out."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from kfac_optax._layout import as_replicated
from kfac_optax._types import Layer, Part


def boxes_left(layers: Iterable[Layer]) -> dict[str, tuple[Part, ...]]:
    """Boxes that no layer has, of every leaf of which some layer has a part; by path.

    >>> from kfac_optax._types import Layout
    >>> layout, part = Layout((2, 1), (2, 1), (0, 1)), Part((2, 3), (0, 1), (2, 1))
    >>> layer = Layer("w", "dense", "w", None, 2, 1, layout, part=part)
    >>> print(*boxes_left([layer])["w"])
    [:, 0] [:, 2]
    """
    taken: dict[str, list[Part]] = {}
    for layer in layers:
        kernel = layer.kernel, layer.part
        bias = layer.bias, layer.bias_part
        for name, part in (kernel, bias):
            if name is not None and part is not None:
                mine = _of_leaf(part, layer.stack)
                taken.setdefault(name, []).append(mine)
    # parts that together are all of a leaf leave nothing
    left = {name: _left_over(parts) for name, parts in taken.items()}
    return {name: boxes for name, boxes in left.items() if boxes}


def _of_leaf(part: Part, stack: tuple[int, ...]) -> Part:
    """A part behind the axes of a stack, as a part of the whole leaf."""
    front = (0,) * len(stack)
    return Part(
        shape=(*stack, *part.shape),
        starts=(*front, *part.starts),
        sizes=(*stack, *part.sizes),
    )


def _left_over(taken: Sequence[Part]) -> tuple[Part, ...]:
    # all of the leaf, before anything is taken
    shape = taken[0].shape
    boxes = [Part(shape, (0,) * len(shape), shape)]
    for part in taken:
        left = [_without(box, part) for box in boxes]
        boxes = list(itertools.chain.from_iterable(left))
    return tuple(boxes)


def _without(box: Part, taken: Part) -> list[Part]:
    """What is left of a box, as boxes: slabs in front of and behind what is taken, axis by axis."""
    left: list[Part] = []
    for axis, (start, size) in enumerate(zip(taken.starts, taken.sizes, strict=True)):
        # what is taken of the box along this axis, [low, high)
        first = box.starts[axis]
        end = first + box.sizes[axis]
        low = max(start, first)
        high = min(start + size, end)
        if low >= high:  # they do not meet
            return [*left, box]
        slabs = (first, low), (high, end)
        left += [_along(box, axis, a, b) for a, b in slabs if a < b]
        # the slabs are gone; the next axis cuts what is between them
        box = _along(box, axis, low, high)
    return left


def _along(box: Part, axis: int, start: int, end: int) -> Part:
    """The box from `start` to `end` along an axis."""
    starts = list(box.starts)
    sizes = list(box.sizes)
    starts[axis] = start
    sizes[axis] = end - start
    return Part(box.shape, tuple(starts), tuple(sizes))


def size_of(boxes: Iterable[Part]) -> int:
    """How many numbers are in them."""
    return sum(math.prod(box.sizes) for box in boxes)


def within_box(leaf: jax.Array, box: Part) -> jax.Array:
    """The numbers of a leaf in a box, which an array split over explicit mesh axes is gathered for."""
    return as_replicated(leaf)[box.slices]


def with_box(leaf: jax.Array, box: Part, numbers: jax.Array) -> jax.Array:
    """The leaf with these numbers in a box."""
    numbers = as_replicated(numbers).astype(leaf.dtype)
    return as_replicated(leaf).at[box.slices].set(numbers)


def copied(
    into: jax.Array,
    boxes: Iterable[Part],
    source: jax.Array,
) -> jax.Array:
    """`into` with the numbers of `source` in these boxes."""
    for box in boxes:
        into = with_box(into, box, within_box(source, box))
    return into


def emptied(
    leaves: Mapping[str, jax.Array],
    boxes: Mapping[str, Iterable[Part]],
) -> dict[str, jax.Array]:
    """Leaves by name, zero in these boxes of some."""
    out = dict(leaves)
    for name, mine in boxes.items():
        if name in leaves:
            leaf = leaves[name]
            out[name] = copied(leaf, mine, jnp.zeros_like(leaf))
    return out
