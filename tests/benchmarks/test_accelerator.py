"""The benchmarks' runner, and a dry run of the accelerator's parts."""

import functools
import json

import pytest

from benchmarks import parts
from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import steps
from benchmarks.accelerator.training import compile_cost, training


def _rows(record, part):
    return {row["name"]: row for row in record["parts"][part]}


def _fail(small):
    yield parts.Case("good", lambda: {"number": 1.0})
    yield parts.Case("bad", lambda: {"number": 1 / 0})
    yield parts.Case("after", lambda: {"number": 2})
    raise KeyError("gone")


def test_an_error_is_recorded_and_the_rest_goes_on(tmp_path, capsys):
    out = tmp_path / "new" / "record.json"
    record = parts.run({"one": _fail, "two": _fail}, out=out)
    for part in ("one", "two"):
        rows = _rows(record, part)
        assert rows["good"]["number"] == 1 and rows["after"]["number"] == 2
        assert rows["bad"]["error"].startswith("ZeroDivisionError")
        assert rows["(the part itself)"]["error"] == "KeyError: 'gone'"
    assert json.loads(out.read_text())["parts"] == record["parts"]
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_what_was_measured_before_an_interruption_is_in_the_file(tmp_path):
    def stop():
        raise KeyboardInterrupt

    out = tmp_path / "record.json"
    cases = [parts.Case("first", lambda: {"number": 1}), parts.Case("second", stop)]
    with pytest.raises(KeyboardInterrupt):
        parts.run({"part": lambda small: cases}, out=out)
    assert json.loads(out.read_text())["parts"]["part"] == [{"name": "first", "number": 1}]


def test_nothing_starts_after_the_limit():
    record = parts.run({"part": _fail}, limit=0)
    assert record["parts"]["part"] == [{"name": "(the whole part)", "left_out": "out of time"}]


def test_cheap_parts(tmp_path):
    out = tmp_path / "accelerator.json"
    names = "precision,accuracy,factorisations"
    record = accelerator.main(["--small", "--parts", names, "--out", str(out)])
    assert json.loads(out.read_text()) == record | {"seconds": pytest.approx(record["seconds"], 1)}
    rows = [row for part in names.split(",") for row in record["parts"][part]]
    assert not [row for row in rows if "error" in row]
    exact = _rows(record, "accuracy")["16: highest / highest"]
    errors = [value for name, value in exact.items() if name.startswith(("A", "G", "inv", "upd"))]
    assert len(errors) == 6 and max(errors) < 1e-5
    assert _rows(record, "factorisations")["2 x 8: matmul, highest"]["products"] == 1


def test_training():
    """The host's count runs every kind; the mean of the kinds weighs them as the schedule does."""
    only = functools.partial(training, steps.stack, only=("sgd", "kfac, cholesky"))
    rows = _rows(parts.run({"stack": only}, small=True), "stack")
    assert not [row for row in rows.values() if "error" in row]
    assert rows["sgd: 20 steps"]["/ SGD"] == 1
    kinds = [rows[f"kfac, cholesky: {kind}"] for kind in ("plain", "statistics", "inverses")]
    plain, measured, inverted = (kind["seconds"] for kind in kinds)
    mean = rows["kfac, cholesky: 10/100, mean of the kinds"]["seconds"]
    assert mean == pytest.approx((90 * plain + 9 * measured + inverted) / 100)
    assert rows["kfac, cholesky: traced schedule, 100 steps"]["seconds"] > 0


def test_names_that_no_part_has(capsys):
    with pytest.raises(SystemExit):
        accelerator.main(["--parts", "factorizations"])
    assert "factorisations" in capsys.readouterr().err


@pytest.mark.slow
def test_everything(tmp_path):
    record = accelerator.main(["--small", "--limit", "1e9", "--out", str(tmp_path / "all.json")])
    rows = [row for part in record["parts"].values() for row in part]
    assert set(record["parts"]) == set(accelerator.PARTS)
    assert not [row for row in rows if "error" in row or "left_out" in row]


def test_compile_cost_counts_equations():
    rows = list(compile_cost(True))[:2]
    sgd, kfac = (case.measure() for case in rows)
    assert sgd["compile / SGD"] == 1
    assert kfac["equations"] > sgd["equations"] > 0
