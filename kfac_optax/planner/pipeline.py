"""Schedules of one step of a pipeline: which stage works on which microbatch when."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from kfac_optax._validate import check_choice
from kfac_optax.engine.division import EIGH
from kfac_optax.planner.formulas import Shape

ORDERS = ("gpipe", "1f1b")


class Stage(NamedTuple):
    """Times of one stage of a pipeline, in any unit.

    Attributes:
      forward: of one microbatch.
      backward: of one microbatch.
      curvature: of the statistics of one microbatch, one entry for each layer.
      inversion: of the refresh, one entry for each layer.
      precondition: of the gradient, in every step.
    """

    forward: float = 1.0
    backward: float = 2.0
    curvature: tuple[float, ...] = ()
    inversion: tuple[float, ...] = ()
    precondition: float = 0.0


class Work(NamedTuple):
    """A piece of work on a stage, from `start` to `end`; `microbatch` is -1 where it is for all of
    them, `layer` is -1 where it is for all layers.
    """

    kind: str  # "forward", "backward", "precondition", "curvature" or "inversion"
    stage: int
    microbatch: int
    layer: int
    start: float
    end: float


def stage_of(
    shapes: Sequence[Shape],
    rows: int,
    unit: float = 1.0,
) -> Stage:
    """Times of a stage with some layers, by their operations: forward `2 R p q` of `R` rows,
    backward twice that, curvature `2 R (p^2 + q^2)`, inversion `9 (p^3 + q^3)`, and
    `4 p q (p + q)` to precondition in eigenbases.

    Args:
      shapes: of the layers of this stage.
      rows: R of one microbatch, examples times positions.
      unit: operations of a unit of time.

    >>> stage = stage_of([Shape(2, 4, 4)], rows=8, unit=256.0)
    >>> print(stage.forward, stage.backward, stage.curvature, stage.inversion)
    2.0 4.0 (2.0, 2.0) (4.5, 4.5)
    """
    forward = sum(2.0 * rows * s.copies * s.gradient for s in shapes) / unit
    solve = sum(4.0 * s.copies * s.gradient * (s.p + s.q) for s in shapes) / unit
    curvature: list[float] = []
    inversion: list[float] = []
    for s in shapes:
        curvature += [2.0 * rows * s.factors / unit] * s.copies
        inversion += [EIGH * float(s.work) / unit] * s.copies
    return Stage(forward, 2 * forward, tuple(curvature), tuple(inversion), solve)


def schedule(
    stages: Sequence[Stage],
    microbatches: int,
    order: str = "1f1b",
) -> tuple[Work, ...]:
    """One step of a pipeline that is flushed behind it, every piece of work as early as it can be.

    A forward pass waits for that of the stage before, a backward pass for that of the stage behind;
    gradients are preconditioned behind a stage's last backward pass.

    Args:
      stages: their times, D of them.
      microbatches: N.
      order: `"gpipe"`, all forward passes first, or `"1f1b"`, a backward pass behind each forward
        pass as soon as there is one.

    Returns:
      All work of one step, from time 0, by stage and start.

    Raises:
      ValueError: no stage or microbatch, a time that is negative or not finite, an unknown order.

    >>> works = schedule([Stage(1, 1)] * 2, 2, "gpipe")
    >>> print([(w.kind[0], w.microbatch, w.start) for w in works if w.stage == 0])
    [('f', 0, 0.0), ('f', 1, 1.0), ('b', 1, 4.0), ('b', 0, 5.0)]

    Reference: Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline
      Parallelism (2019); Narayanan et al., PipeDream: Generalized Pipeline Parallelism for DNN
      Training (2019), for one forward and one backward pass in turn.
    """
    _check(stages, microbatches, order)
    depth = len(stages)
    waiting = [_order(order, s, depth, microbatches) for s in range(depth)]
    free, ends = [0.0] * depth, {}
    works: list[list[Work]] = [[] for _ in stages]
    # a sweep over the stages does at least one piece of work: no order here waits for itself
    while any(waiting):
        for s, stage in enumerate(stages):
            # all that this stage can do with what others have done so far
            while waiting[s]:
                kind, k = waiting[s][0]
                ready = _ready(kind, s, k, depth, ends)
                if ready is None:
                    break
                start = max(free[s], ready)
                free[s] = start + (stage.forward if kind == "forward" else stage.backward)
                ends[kind, s, k] = free[s]
                works[s].append(Work(kind, s, k, -1, start, free[s]))
                waiting[s].pop(0)
    # behind the last backward pass of each stage
    for s, stage in enumerate(stages):
        if stage.precondition:
            end = free[s] + stage.precondition
            works[s].append(Work("precondition", s, -1, -1, free[s], end))
    return tuple(itertools.chain.from_iterable(works))


def _order(
    order: str,
    stage: int,
    depth: int,
    microbatches: int,
) -> list[tuple[str, int]]:
    """In which order a stage does its passes."""
    forward = [("forward", k) for k in range(microbatches)]
    if order == "gpipe":
        # the last to come in is the first to go back
        return forward + [("backward", k) for k in reversed(range(microbatches))]
    backward = [("backward", k) for k in range(microbatches)]
    # as many forward passes ahead as there are stages behind
    ahead = min(depth - 1 - stage, microbatches)
    found = forward[:ahead]
    # then one of each in turn; the last backward passes have no forward pass beside them
    for k in range(microbatches):
        found += forward[ahead + k : ahead + k + 1] + backward[k : k + 1]
    return found


def _ready(
    kind: str,
    stage: int,
    k: int,
    depth: int,
    ends: dict,
) -> float | None:
    """When what a pass waits for is done; `None` where nobody knows yet."""
    # activations come from the stage before
    if kind == "forward":
        return 0.0 if stage == 0 else ends.get(("forward", stage - 1, k))
    # the last stage has the loss, gradients come from the stage behind
    if stage == depth - 1:
        return ends.get(("forward", stage, k))
    return ends.get(("backward", stage + 1, k))


def _check(stages: Sequence[Stage], microbatches: int, order: str) -> None:
    check_choice("schedule", "order", order, ORDERS)
    if not stages or microbatches < 1:
        raise ValueError(
            f"schedule: got {len(stages)} stages and {microbatches} microbatches; expected at least "
            "one of each."
        )
    for s, stage in enumerate(stages):
        passes = stage.forward, stage.backward
        times = *passes, stage.precondition, *stage.curvature, *stage.inversion
        if not all(map(math.isfinite, times)) or min(times) < 0 or min(passes) == 0:
            raise ValueError(
                f"schedule: stage {s} has times {stage}; expected finite ones, forward and backward "
                "above 0, and none below."
            )
        if len(stage.curvature) != len(stage.inversion):
            raise ValueError(
                f"schedule: stage {s} has {len(stage.curvature)} times of curvature and "
                f"{len(stage.inversion)} of inversion; expected one of each for every layer."
            )
