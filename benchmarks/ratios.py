"""Ratios of running times within one run: the two sides take turns, so that a drifting machine hits
both.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# kinds of a static step: whether it measures statistics, and refreshes inverses
KINDS = {"plain": (False, False), "statistics": (True, False), "inverses": (True, True)}


class Ratio(NamedTuple):
    """Median over rounds of `a / b`, with its quartiles."""

    median: float
    low: float
    high: float

    def quartiles(self) -> dict[str, float]:
        return {"quartile 1": self.low, "quartile 3": self.high}


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


def amortised(times: dict[str, list[float]], every: int, inverse: int) -> list[float]:
    """Seconds of a step round by round, on average with statistics every so many steps and inverses
    too every `inverse`; times of all `KINDS`.
    """
    kinds = zip(*(times[kind] for kind in KINDS), strict=True)
    return [
        plain * (1 - 1 / every) + measured * (1 / every - 1 / inverse) + inverted / inverse
        for plain, measured, inverted in kinds
    ]


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table, a column for every key that occurs."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| | {' | '.join(keys)} |", "| --- " * (len(keys) + 1) + "|"]
    for name, row in rows.items():
        cells = [_cell(row.get(key, "")) for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")
