"""Cost of K-FAC and two-level K-FAC on the 64-layer net:
`pytest benchmarks --benchmark-enable -p no:xdist`.
"""

import functools

import pytest

from benchmarks.deep_net import make_step, run
from benchmarks.ratios import KINDS, amortised, paired, ratio

ROUNDS, STEPS = 15, 20
PERIODS = (10, 100)


@functools.cache
def step(name, measure=None, refresh=None):
    return make_step(name, measure=measure, refresh=refresh)


def timed(times=STEPS, **sides):
    return paired({name: functools.partial(run, s, times) for name, s in sides.items()}, ROUNDS)


def test_two_level_over_one_level(benchmark, report):
    for label, flags in (
        ("plain", (False, False)),
        ("with statistics", (True, False)),
        ("with inverses", (True, True)),
    ):
        times = timed(one=step("kfac", *flags), two=step("two_level", *flags))
        report(
            f"two-level / one-level, {label} step",
            ratio(times["two"], times["one"]),
            "1.05" if label == "plain" else "",
        )
    benchmark.pedantic(run, (step("two_level", False, False), STEPS), rounds=5)


@pytest.mark.parametrize("name", ["kfac", "two_level", "two_level_exact"])
def test_amortised_over_sgd(benchmark, report, name):
    times = timed(sgd=step("sgd"), **{k: step(name, *flags) for k, flags in KINDS.items()})
    report(
        f"{name} / SGD, static schedule 10/100",
        ratio(amortised(times, *PERIODS), times["sgd"]),
        "1.35",
    )
    times = timed(100, sgd=step("sgd"), traced=step(name))
    report(f"{name} / SGD, traced schedule 10/100", ratio(times["traced"], times["sgd"]), "")
    benchmark.pedantic(run, (step(name), STEPS), rounds=5)


def test_plain_step_over_its_matmuls(benchmark, report):
    times = timed(
        sgd=step("sgd"),
        matmuls=step("matmuls"),
        kfac=step("kfac", False, False),
        two=step("two_level", False, False),
    )
    report(
        "plain K-FAC step / SGD step with bare matmuls",
        ratio(times["kfac"], times["matmuls"]),
        "1.05",
    )
    report(
        "plain two-level step / SGD step with bare matmuls",
        ratio(times["two"], times["matmuls"]),
        "",
    )
    report("SGD step with bare matmuls / SGD step", ratio(times["matmuls"], times["sgd"]), "")
    benchmark.pedantic(run, (step("kfac", False, False), STEPS), rounds=5)


def test_compile_time_over_sgd(benchmark, report):
    # warm up the tracing itself
    first = {name: make_step(name).compile_s for name in ("sgd", "kfac", "two_level")}
    again = {name: min(make_step(name).compile_s for _ in range(2)) for name in first}
    report("compile two-level (traced) / compile SGD", again["two_level"] / again["sgd"], "4")
    report("compile one-level (traced) / compile SGD", again["kfac"] / again["sgd"], "")
    plain = min(make_step("two_level", measure=False, refresh=False).compile_s for _ in range(2))
    report("compile two-level plain static step / compile SGD", plain / again["sgd"], "")
    benchmark.pedantic(run, (step("sgd"), STEPS), rounds=5)
