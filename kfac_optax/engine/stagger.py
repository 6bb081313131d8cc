"""Which matrices are factorised together when the refresh of the inverses is spread over several
steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

# of every bucket that has matrices in it: the first copy, and the one behind the last
Part = dict[str, tuple[int, int]]


def divide(costs: Mapping[str, tuple[int, float]], *, parts: int) -> tuple[Part, ...]:
    """Divides all matrices into parts of about equal cost, a contiguous range of every bucket in
    each.

    Buckets come in order of the cost of one copy, the largest first; again and again the part with
    the least takes as many copies as fit under the mean, at least one. So no part exceeds the mean
    by more than one copy, and few buckets are cut.

    Args:
      costs: of every bucket the number of copies and the cost of one.
      parts: how many; some stay empty where there are fewer matrices.

    Returns:
      The parts. The first is never empty.

    >>> print(divide({"large": (1, 8.0), "small": (6, 2.0)}, parts=2))
    ({'large': (0, 1), 'small': (0, 1)}, {'small': (1, 6)})
    """
    mean = sum(copies * cost for copies, cost in costs.values()) / parts
    load = [0.0] * parts
    taken = [dict.fromkeys(costs, 0) for _ in range(parts)]
    # the largest first: small ones fill up what is left
    for name in sorted(costs, key=lambda name: -costs[name][1]):
        copies, cost = costs[name]
        left = copies
        while left:
            j = load.index(min(load))
            fit = left if cost <= 0 else int((mean - load[j]) / cost)
            count = min(left, max(fit, 1))
            taken[j][name] += count
            load[j] += count * cost
            left -= count
    divided: list[Part] = []
    # from numbers of copies to ranges
    start = dict.fromkeys(costs, 0)
    for counts in taken:
        end = {name: start[name] + n for name, n in counts.items()}
        divided.append({name: (start[name], end[name]) for name, n in counts.items() if n})
        start = end
    return tuple(divided)


def cost(shapes: list[tuple[int, ...]]) -> float:
    """Operations, up to a factor, to factorise a layer's statistics: `n^3` for every `n x n`
    matrix, else the entries.

    >>> print(cost([(3, 3), (2, 2), (5,)]))
    40.0
    """
    total = 0.0
    for shape in shapes:
        entries = 1.0
        for size in shape:
            entries *= size
        # n^3 = entries * n
        square = len(shape) >= 2 and shape[-1] == shape[-2]
        total += entries * shape[-1] if square else entries
    return total


def phase(part: int, every: Any, parts: int) -> Any:
    """Step within a period at which a part is due, `part * every // parts`; the period may be a
    traced number.

    >>> print([phase(j, 10, 4) for j in range(4)], [phase(j, 2, 4) for j in range(4)])
    [0, 2, 5, 7] [0, 0, 1, 1]
    """
    return part * every // parts


def check_parts(where: str, stagger: Any) -> int:
    """The number of parts; `None` stands for one."""
    if stagger is None:
        return 1
    if not isinstance(stagger, int) or isinstance(stagger, bool):
        raise TypeError(
            f"{where}: stagger is {stagger!r}; expected a Python int or None. It decides what is "
            "compiled: under "
            'optax.inject_hyperparams name it in static_args=("stagger",).'
        )
    if stagger < 1:
        raise ValueError(f"{where}: stagger={stagger!r}; expected stagger >= 1.")
    return stagger


def chosen(where: str, refresh: Any, parts: int) -> tuple[bool, ...]:
    """Which parts `refresh=` names: all for `True`, none for `False`, else those of a tuple of
    numbers.

    >>> print(chosen("update", (2,), 3))
    (False, False, True)
    """
    if isinstance(refresh, (bool, np.bool_)):
        return (bool(refresh),) * parts
    # True and False are ints, but no numbers of parts
    if not isinstance(refresh, tuple) or not all(
        isinstance(j, int) and not isinstance(j, bool) for j in refresh
    ):
        raise TypeError(
            f"{where}: refresh is {refresh!r}; expected None, True, False or a tuple of part "
            "numbers, as HostSchedule gives."
        )
    beyond = [j for j in refresh if not 0 <= j < parts]
    if beyond:
        raise ValueError(
            f"{where}: refresh={refresh!r}; expected part numbers from 0 to {parts - 1}, because "
            f"stagger={parts}. Give HostSchedule and the transformation the same stagger."
        )
    return tuple(j in refresh for j in range(parts))
