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
    single = {kernel: mine for kernel, mine in biases.items() if len(mine) == 1}
    only = {kernel: next(iter(mine)) for kernel, mine in single.items()}
    return {kernel: bias for kernel, bias in only.items() if len(kernels[bias]) == 1}


def apart(groups: Mapping[Key, Members], scales: Mapping[Key, bool]) -> dict[Key, Members]:
    """Groups without those whose part of a leaf overlaps that of another.

    The whole leaf comes before its parts and weights before scales and shifts, of which no leaf has
    both.
    """
    kept: dict[int, list[Key]] = {}  # by leaf
    # whole leaves before parts, kernels before scales
    in_order = sorted(groups, key=lambda key: (key[1] is not None, scales.get(key, False)))
    for key in in_order:
        others = kept.setdefault(key[0], [])
        if any(_overlap(key[1], other[1]) for other in others):
            continue
        # kernels beside kernels and scales beside scales; never both in one leaf
        if all(scales.get(key) == scales.get(other) for other in others):
            others.append(key)
    return {key: members for key, members in groups.items() if key in kept[key[0]]}


def _overlap(one: Part | None, other: Part | None) -> bool:
    if one is None or other is None:
        return True
    # boxes overlap where they do on every axis; from the last one on: a part inside a scan over the
    # leaf has all of the axes in front
    axes = zip(*map(reversed, (one.starts, one.sizes, other.starts, other.sizes)), strict=False)
    return all(a < b + m and b < a + n for a, n, b, m in axes)
