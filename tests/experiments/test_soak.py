"""A soak of few steps: every fault is met and counted, and training goes on."""

import pytest

from kfac_optax.experiments import soak


def counted(report):
    """How often the state counted what, by the first word after the number."""
    found = {}
    for sentence in report.problems:
        number, words = sentence.split(" ", 1)
        found[words] = int(number)
    return found


def total(report, *faults):
    return sum(report.faults[name] for name in faults)


def number_of(found, words):
    return next((count for sentence, count in found.items() if sentence.startswith(words)), 0)


def test_every_fault_is_met_and_counted():
    report = soak.soak("kfac", steps=100, seed=1, fault_rate=0.3)
    assert report.failures() == []
    assert all(report.faults.values()), report.faults
    found = counted(report)
    assert number_of(found, "updates were not finite") == total(report, "nan", "infinite")
    assert number_of(found, "values of damping made no sense") == report.faults["damping"]
    assert number_of(found, "statistics were not finite") <= report.faults["nan"]


@pytest.mark.slow
@pytest.mark.parametrize("name", soak.METHODS)
def test_every_method_outlives_all_faults(name):
    report = soak.soak(name, steps=400, fault_rate=0.3)
    assert report.failures() == []
    found = counted(report)
    if name == "shampoo":
        left_out = number_of(found, "gradients were not finite")
        assert left_out == total(report, "nan", "infinite")
    elif name == "spring":
        left_out = number_of(found, "steps were left out")
        assert left_out == total(report, "nan", "infinite", "weightless")
    else:
        left_out = number_of(found, "updates were not finite")
        assert left_out == total(report, "nan", "infinite")


def test_what_grows_or_breaks_is_said():
    good = soak.Report(
        method="kfac",
        steps=100,
        faults={"nan": 3},
        loss=(1.0, 0.1),
        memory=(500.0, 501.0),
        arrays=(40, 40),
        traces=1,
        finite=True,
        problems=["3 updates"],
    )
    assert good.failures() == []
    broken = good._replace(
        loss=(1.0, float("nan")), memory=(500.0, 600.0), arrays=(40, 41), traces=2, finite=False
    )
    assert len(broken._replace(problems=[]).failures()) == 6
    assert "the loss went from 1.0000 to nan" in broken.failures()
