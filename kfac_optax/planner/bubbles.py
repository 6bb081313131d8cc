"""K-FAC's own work in the bubbles of a pipeline, where it takes no time."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from kfac_optax.planner.pipeline import Stage, Work, schedule


class Unit(NamedTuple):
    """A piece of K-FAC's work that waits: of what, how long, and since when it is ready, which is
    never as long as it waits for others.
    """

    kind: str
    microbatch: int
    layer: int
    time: float
    ready: float


class Filled(NamedTuple):
    """A pipeline whose bubbles hold K-FAC's work.

    Attributes:
      step_time: of one step, with or without it.
      period: steps in which a refresh is done, from its first statistic to its last inverse. The
        bubble in front of a stage's first work of a step counts as one of the step before.
      before: share of all stages' time in which they work, without curvature and inversion.
      after: the same with both.
      appended: time of a step if both were done behind the steps of a period instead.
      works: all work of a period, by stage and start.
    """

    step_time: float
    period: int
    before: float
    after: float
    appended: float
    works: tuple[Work, ...]


def fill(
    stages: Sequence[Stage],
    microbatches: int,
    order: str = "1f1b",
) -> Filled:
    """Fills the bubbles of a pipeline with curvature and inversion, and moves nothing else.

    The statistics of a microbatch are ready behind its backward pass on a stage, a layer's
    inversion behind its statistics of all microbatches. Bubbles are walked through in the order of
    time; each takes, again and again, the first piece that is ready and fits. What finds no place
    in one step spills into the next, and the next refresh begins with the step behind the last
    piece. Statistics stay on their stage: sums over data-parallel copies of a stage are not counted.

    Args:
      stages: times of each; a layer's curvature or inversion is not divided any further.
      microbatches: N.
      order: as in `schedule`.

    Raises:
      ValueError: a piece is longer than the longest bubble of its stage, or there is none.

    >>> stages = [Stage(1, 2, curvature=(1,), inversion=(3,))] * 4
    >>> for order in ("gpipe", "1f1b"):
    ...     found = fill(stages, 4, order)
    ...     print(f"{order}: {found.before:.2f} -> {found.after:.2f}, refreshed in {found.period}")
    gpipe: 0.57 -> 0.74, refreshed in 2
    1f1b: 0.57 -> 0.74, refreshed in 2

    Reference: Osawa, Li & Hoefler, PipeFisher: Efficient Training of Large Language Models Using
      Pipelining and Fisher Information Matrices (2022).
    """
    step = schedule(stages, microbatches, order)
    step_time = max(work.end for work in step)
    works: list[Work] = []
    period = 1
    for s, stage in enumerate(stages):
        mine = [work for work in step if work.stage == s]
        placed, taken = _fill_stage(s, stage, mine, step_time)
        works += placed
        # the slowest stage decides when the next refresh begins
        period = max(period, taken)
    for k in range(period):
        works += [_later(work, k * step_time) for work in step]
    works.sort(key=lambda work: (work.stage, work.start))
    # of all stages together, in one period
    total = len(stages) * period * step_time
    extra = [microbatches * sum(x.curvature) + sum(x.inversion) for x in stages]
    return Filled(
        step_time,
        period,
        sum(work.end - work.start for work in step) * period / total,
        sum(work.end - work.start for work in works) / total,
        # the busiest stage decides
        step_time + max(extra) / period,
        tuple(works),
    )


def _fill_stage(
    s: int,
    stage: Stage,
    mine: Sequence[Work],
    step_time: float,
) -> tuple[list[Work], int]:
    """Where the work of one refresh is done on a stage, and in how many steps."""
    units = _units(stage, mine)
    bubbles = _bubbles(mine, step_time)
    longest = max((length for _, length in bubbles), default=0.0)
    needed = max((unit.time for unit in units), default=0.0)
    if needed > longest:
        raise ValueError(
            f"fill: stage {s} has a piece of work of {needed:g}, and its longest bubble is "
            f"{longest:g}; expected pieces that fit. Give curvature and inversion as more layers, "
            "or take order='gpipe', whose bubbles lie together."
        )
    placed: list[Work] = []
    step = 0
    while units:
        for start, length in bubbles:
            now = step * step_time + start
            placed += _fill_bubble(s, units, now, length)
        step += 1
    return placed, step


def _fill_bubble(
    s: int,
    units: list[Unit],
    now: float,
    length: float,
) -> list[Work]:
    """What one bubble takes; these units are taken out of the list, and what waited for them may be
    ready.
    """
    placed: list[Work] = []
    left = length
    while units:
        # a piece that is not ready yet has to wait within the bubble
        waits = [max(0.0, unit.ready - now) for unit in units]
        fitting = [(wait, i) for i, wait in enumerate(waits) if wait + units[i].time <= left]
        if not fitting:
            break
        wait, i = min(fitting)
        first = units.pop(i)
        now, left = now + wait, left - wait
        placed.append(Work(first.kind, s, first.microbatch, first.layer, now, now + first.time))
        now, left = now + first.time, left - first.time
        _release(units, first.layer, now)
    return placed


def _release(units: list[Unit], layer: int, now: float) -> None:
    """A layer can be inverted once no statistic of it is left."""
    if any(unit.kind == "curvature" and unit.layer == layer for unit in units):
        return
    for i, unit in enumerate(units):
        if unit.kind == "inversion" and unit.layer == layer:
            units[i] = unit._replace(ready=now)


def _units(stage: Stage, mine: Sequence[Work]) -> list[Unit]:
    """The work of a refresh, statistics in the order of the backward passes, then inversions."""
    units: list[Unit] = []
    for work in mine:
        if work.kind == "backward":
            for layer, time in enumerate(stage.curvature):
                units.append(Unit("curvature", work.microbatch, layer, time, work.end))
    for layer, time in enumerate(stage.inversion):
        units.append(Unit("inversion", -1, layer, time, math.inf))
    return units


def _bubbles(mine: Sequence[Work], step_time: float) -> list[tuple[float, float]]:
    """Start and length of the times without work in a step, the last up to the stage's first work
    of the next step. Those of no length take pieces of no time.
    """
    # the next step is the same again
    starts = [work.start for work in mine[1:]] + [step_time + mine[0].start]
    pairs = zip(mine, starts, strict=True)
    # rounding may put the end of a piece behind the start of the next
    return [(work.end, max(0.0, start - work.end)) for work, start in pairs]


def _later(work: Work, time: float) -> Work:
    return work._replace(start=work.start + time, end=work.end + time)


ROW = "{:<6} {:>6} {:>12} {:>10} {:>10} {:>10} {:>7} {:>14}"


def bubble_table(
    stages: Sequence[Stage],
    microbatches: Sequence[int],
    orders: Sequence[str],
) -> str:
    """Lines of a table: what bubbles can hold, for each order and number of microbatches.

    >>> print(bubble_table([Stage(1, 2, (1,), (3,))] * 4, [4], ["gpipe"]))
    order  stages microbatches  step time before/%    after/%  period appended step
    gpipe       4            4      21.00       57.1       73.8      2          24.50
    """
    header = "order,stages,microbatches,step time,before/%,after/%,period,appended step"
    lines: list[str] = [ROW.format(*header.split(","))]
    for order in orders:
        for count in microbatches:
            found = fill(stages, count, order)
            cells = [f"{found.step_time:.2f}", f"{100 * found.before:.1f}"]
            cells += [f"{100 * found.after:.1f}", found.period, f"{found.appended:.2f}"]
            lines.append(ROW.format(order, len(stages), count, *cells))
    return "\n".join(lines)
