"""Schedules of pipelines, and what their bubbles take."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_optax.planner import Shape, Stage, fill, schedule, stage_of
from kfac_optax.planner.__main__ import main

# whole times: sums of them are exact, so that no test needs a tolerance
TIMES = st.integers(1, 4).map(float)
DEPTHS, COUNTS = st.integers(2, 5), st.integers(1, 6)
ORDERS = st.sampled_from(["gpipe", "1f1b"])


@st.composite
def pipelines(draw):
    """Stages of unlike times, with layers that may fit into their bubbles."""
    stages = []
    for _ in range(draw(DEPTHS)):
        layers = draw(st.integers(0, 3))
        times = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=layers, max_size=layers)
        curvature, inversion = tuple(draw(times)), tuple(draw(times))
        stages.append(Stage(draw(TIMES), draw(TIMES), curvature, inversion, draw(TIMES) - 1))
    return stages, draw(COUNTS), draw(ORDERS)


def of_stage(works, stage):
    return [work for work in works if work.stage == stage]


def longest_bubble(step, stage, step_time):
    mine = of_stage(step, stage)
    starts = [*[w.start for w in mine[1:]], step_time + mine[0].start]
    return max(start - w.end for w, start in zip(mine, starts, strict=True))


def check_apart(works, depth):
    for s in range(depth):
        mine = sorted(of_stage(works, s), key=lambda work: (work.start, work.end))
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


@pytest.mark.parametrize("order", ["gpipe", "1f1b"])
@given(depth=st.integers(1, 6), count=st.integers(1, 9), forward=TIMES, backward=TIMES)
@settings(max_examples=25, deadline=None)
def test_bubbles_of_equal_stages_are_as_large_as_theory_says(
    order, depth, count, forward, backward
):
    """`(D - 1) / (N + D - 1)` of the time, whatever forward and backward take, and for both
    orders."""
    works = schedule([Stage(forward, backward)] * depth, count, order)
    total = depth * max(work.end for work in works)
    idle = total - sum(work.end - work.start for work in works)
    assert idle * (count + depth - 1) == total * (depth - 1)


@given(pipelines())
@settings(max_examples=50, deadline=None)
def test_a_step_does_everything_once_in_an_order_that_can_be(pipeline):
    stages, count, order = pipeline
    works = schedule(stages, count, order)
    check_apart(works, len(stages))
    ends = {(work.kind, work.stage, work.microbatch): work.end for work in works}
    assert len(ends) == len(works)
    passes = list(itertools.product(("forward", "backward"), range(len(stages)), range(count)))
    updates = [("precondition", s, -1) for s, x in enumerate(stages) if x.precondition]
    assert set(ends) == {*passes, *updates}
    for work in works:
        k, s = work.microbatch, work.stage
        before = {
            "forward": ("forward", s - 1, k) if s else None,
            "backward": ("backward", s + 1, k) if s + 1 < len(stages) else ("forward", s, k),
        }.get(work.kind)
        if before is not None:
            assert ends[before] <= work.start
        if work.kind == "precondition":
            assert all(ends["backward", s, m] <= work.start for m in range(count))


@given(st.integers(2, 5), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_one_forward_one_backward_holds_fewer_microbatches(depth, count):
    """Those whose forward pass is done and whose backward pass is not: at most `D - s` on stage
    `s`, where GPipe holds all."""
    for order, most in (("gpipe", lambda s: count), ("1f1b", lambda s: min(count, depth - s))):
        works = schedule([Stage()] * depth, count, order)
        for s in range(depth):
            held, largest = 0, 0
            for work in of_stage(works, s):
                held += 1 if work.kind == "forward" else -1
                largest = max(largest, held)
            assert largest == most(s)


@given(pipelines())
@settings(max_examples=50, deadline=None)
def test_bubbles_take_all_work_and_nothing_else_moves(pipeline):
    stages, count, order = pipeline
    step = schedule(stages, count, order)
    step_time = max(work.end for work in step)
    needed = [max([0.0, *x.curvature, *x.inversion]) for x in stages]
    if any(needed[s] > longest_bubble(step, s, step_time) for s in range(len(stages))):
        with pytest.raises(ValueError, match="longest bubble"):
            fill(stages, count, order)
        return
    found = fill(stages, count, order)
    check_apart(found.works, len(stages))
    assert found.step_time == step_time
    # every step of a period as it was
    for k in range(found.period):
        shifted = {(w.kind, w.stage, w.microbatch, w.start + k * found.step_time) for w in step}
        assert shifted <= {(w.kind, w.stage, w.microbatch, w.start) for w in found.works}
    extra = [w for w in found.works if w.kind in ("curvature", "inversion")]
    assert len(found.works) == found.period * len(step) + len(extra)
    for s, stage in enumerate(stages):
        mine = of_stage(extra, s)
        wanted = sorted([*stage.curvature * count, *stage.inversion])
        assert sorted(w.end - w.start for w in mine) == wanted
        ends = {w.microbatch: w.end for w in of_stage(step, s) if w.kind == "backward"}
        done = {(w.microbatch, w.layer): w.end for w in mine if w.kind == "curvature"}
        assert len(done) == count * len(stage.curvature)
        for work in mine:
            if work.kind == "curvature":
                assert ends[work.microbatch] <= work.start
            else:
                assert all(done[k, work.layer] <= work.start for k in range(count))
    # one refresh behind the other, and the last piece in the last step's bubbles
    length = found.period * found.step_time
    again = [w._replace(start=w.start + length, end=w.end + length) for w in found.works]
    check_apart([*found.works, *again], len(stages))
    assert max([0.0, *(w.end for w in extra)]) >= length - found.step_time
    assert found.before <= found.after <= 1 + 1e-12
    # work that takes bubbles takes no time: never slower than behind the steps
    assert found.step_time <= found.appended


def test_pieces_of_no_time_need_no_bubble():
    found = fill([Stage(3, 3, (0.0,), (0.0,), 2), Stage(2, 1)], 3)
    (first,) = [w for w in found.works if w.kind == "inversion"]
    assert (found.period, first.stage, first.start) == (1, 0, first.end)
    assert found.before == found.after


def test_a_long_refresh_spills_into_the_next_steps():
    """Each stage idles 6 of 15 units; statistics take 3, inversions 11: three steps."""
    stages = [Stage(1, 2, (1.0,) * 1, (2.0,)), Stage(1, 2, (1.0,), (2.0,))]
    stages += [Stage(1, 2, (1.0, 0.0, 0.0), (3.0, 4.0, 4.0))]
    found = fill(stages, 3, "gpipe")
    assert (found.step_time, found.period) == (15.0, 3)
    assert found.before == 9 / 15
    assert found.after == pytest.approx((3 * 27 + 5 + 5 + 14) / (3 * 45))
    assert found.appended == pytest.approx(15 + 14 / 3)


def test_what_fits_nowhere_and_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="stage 0 has a piece of work of 7.*bubble is 2; expected"):
        fill([Stage(1, 2, (1.0,), (7.0,))] * 2, 2)
    with pytest.raises(ValueError, match="longest bubble is 0"):
        fill([Stage(1, 2, (1.0,), (1.0,))], 2)
    for stages, count, order, message in (
        ([Stage(1, 2, (float("nan"),), (1.0,))], 1, "gpipe", "expected finite ones"),
        ([Stage(float("inf"), 2)], 1, "gpipe", "expected finite ones"),
        ([], 1, "gpipe", "got 0 stages"),
        ([Stage()], 0, "gpipe", "0 microbatches"),
        ([Stage()], 1, "chimera", "one of 'gpipe', '1f1b'"),
        ([Stage(forward=0.0)], 1, "gpipe", "forward and backward above 0"),
        ([Stage(inversion=(-1.0,), curvature=(1.0,))], 1, "gpipe", "none below"),
        ([Stage(curvature=(1.0,))], 1, "gpipe", "one of each for every layer"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule(stages, count, order)


def test_times_of_a_stage_are_those_of_its_layers():
    stage = stage_of([Shape(2, 3, 5), Shape(1, 4, 4)], rows=10)
    assert stage.forward == 2 * 10 * (2 * 15 + 16)
    assert stage.backward == 2 * stage.forward
    assert stage.curvature == (2 * 10 * 34.0,) * 2 + (2 * 10 * 32.0,)
    assert stage.inversion == (9 * 152.0,) * 2 + (9 * 128.0,)
    assert stage.precondition == 4 * (2 * 15 * 8 + 16 * 8)


def test_the_command_prints_a_line_for_each_order_and_number(capsys):
    main(["--pipeline", "gpipe", "1f1b", "--stages", "4", "--microbatches", "4", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        [order, "4", count] for order in ("gpipe", "1f1b") for count in ("4", "8")
    ]
