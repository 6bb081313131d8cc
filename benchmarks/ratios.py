"""Ratios of running times within one run: the two sides take turns, so that a drifting machine hits
both.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Ratio(NamedTuple):
    """Median over rounds of `a / b`, with its quartiles."""

    median: float
    low: float
    high: float


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round, in turn."""
    for function in sides.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        order = list(sides) if i % 2 == 0 else list(sides)[::-1]
        for name in order:
            times[name].append(seconds(sides[name]))
    return times


def ratio(a: list[float], b: list[float]) -> Ratio:
    values = sorted(x / y for x, y in zip(a, b))
    low, _, high = statistics.quantiles(values, n=4)
    return Ratio(statistics.median(values), low, high)
