"""Which bias belongs to which kernel, and which layer has which part of a parameter."""

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from kfac_optax._types import Part

Key = tuple[int, Part | None]  # leaf, and part of it
Members = TypeVar("Members")
Kernel = TypeVar("Kernel", bound=Hashable)
Bias = TypeVar("Bias", bound=Hashable)


def own_biases(pairs: Iterable[tuple[Kernel, Bias]]) -> dict[Kernel, Bias]:
    """The bias of every kernel that has one and no other, if no other kernel has it.

    >>> print(own_biases([("v", "a"), ("v", "a"), ("w", "b"), ("x", "c"), ("y", "c")]))
    {'v': 'a', 'w': 'b'}
    """
    # both ways, to see who has more than one
    biases: dict[Kernel, set[Bias]] = {}
    kernels: dict[Bias, set[Kernel]] = {}
    for kernel, bias in pairs:
        biases.setdefault(kernel, set()).add(bias)
        kernels.setdefault(bias, set()).add(kernel)
    own = {}
    for kernel, mine in biases.items():
        bias = next(iter(mine))
        alone = len(mine) == 1 and len(kernels[bias]) == 1
        if alone:
            own[kernel] = bias
    return own


def apart(
    groups: Mapping[Key, Members],
    scales: Mapping[Key, bool],
) -> dict[Key, Members]:
    """Groups without those whose part of a leaf overlaps that of another.

    The whole leaf comes before its parts and weights before scales and shifts, of which no leaf has
    both.
    """
    kept: dict[int, list[Key]] = {}  # by leaf

    # whole leaves before parts, kernels before scales
    def turn(key: Key) -> tuple[bool, bool]:
        _, part = key
        return part is not None, scales.get(key, False)

    for key in sorted(groups, key=turn):
        leaf, part = key
        others = kept.setdefault(leaf, [])
        if any(_overlap(part, other) for _, other in others):
            continue
        # kernels beside kernels and scales beside scales; never both in one leaf
        if all(scales.get(key) == scales.get(other) for other in others):
            others.append(key)
    found = set().union(*kept.values())
    return {key: members for key, members in groups.items() if key in found}


def _overlap(one: Part | None, other: Part | None) -> bool:
    if one is None or other is None:
        return True
    # boxes overlap where they do on every axis; from the last one on: a part inside a scan over the
    # leaf has all of the axes in front
    count = min(len(one.sizes), len(other.sizes))
    for axis in range(-1, -1 - count, -1):
        first, second = one.starts[axis], other.starts[axis]
        apart = first + one.sizes[axis] <= second or second + other.sizes[axis] <= first
        if apart:
            return False
    return True
