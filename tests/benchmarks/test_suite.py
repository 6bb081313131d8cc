"""All benchmarks in one record, its page, and two records compared."""

import copy
import json
import pathlib

import pytest

from benchmarks import __main__ as command
from benchmarks import compare, ratios, suite

ROOT = pathlib.Path(__file__).parents[2]
OLD = {
    "environment": {
        "command": "python -m benchmarks",
        "device": "cpu",
        "backend": "cpu",
        "jax": "0.10.2",
        "kfac_optax": "0.1.0",
        "date": "2026-01-01",
    },
    "parts": {
        "steps": [
            {"name": "plain", "seconds": 1.0, "/ SGD": 2.0},
            {"name": "inverses", "seconds": 8.0, "/ SGD": 16.0, "equations": 1000},
            {"name": "broken", "error": "ValueError"},
            {"name": "dropped", "/ SGD": 1.0},
        ],
        "other": [{"name": "not run this time", "/ SGD": 1.0}],
    },
}


def _new():
    """Twice as slow everywhere, one ratio and one count worse, one part and one row gone."""
    new = copy.deepcopy(OLD)
    del new["parts"]["other"]
    plain, inverses, _, dropped = new["parts"]["steps"]
    plain |= {"seconds": 2.0}
    inverses |= {"seconds": 16.0, "/ SGD": 24.0, "equations": 1500}
    dropped |= {"error": "KeyError"}
    del dropped["/ SGD"]
    return new


def test_only_ratios_and_counts_are_compared(capsys):
    found = {change.name: change.factor for change in compare.changes(OLD, _new())}
    assert found == {
        "steps: plain, / SGD": 1.0,
        "steps: inverses, / SGD": 1.5,
        "steps: inverses, equations": 1.5,
    }
    lines = compare.report(OLD, _new(), 1.2)
    assert lines[0] == "3 ratios and counts, 2 worse, 0 better"
    assert lines[-1] == "gone: steps: dropped"
    assert "| steps: inverses, / SGD | 16 | 24 | 1.5 |" in capsys.readouterr().out
    assert compare.report(_new(), OLD, 1.2)[0] == "3 ratios and counts, 0 worse, 2 better"
    assert len(compare.report(OLD, OLD, 1.2)) == 1


def test_what_was_never_measured_is_not_gone():
    old = {"parts": {"steps": [{"name": "late", "left_out": "out of time"}, {"name": "plain"}]}}
    assert compare.missing(old, {"parts": {"steps": []}}) == ["steps: plain"]


def test_another_device_is_said():
    new = _new()
    new["environment"] |= {"device": "gpu"}
    assert compare.report(OLD, new, 1.2)[-1] == "the old record is of another device: cpu"


def test_a_step_on_average_is_the_mean_over_a_period():
    times = {"SGD": [9.0, 9.0], "inverses": [10.0, 20.0], "plain": [1.0, 2.0]}
    times["statistics"] = [3.0, 6.0]
    average = (90 * 1.0 + 9 * 3.0 + 10.0) / 100
    assert ratios.amortised(times, 10, 100) == pytest.approx([average, 2 * average])


def test_page_of_a_record():
    page = compare.page(OLD)
    assert "What `python -m benchmarks` measured: device cpu" in page
    assert "| | seconds | / SGD | equations | error |" in page
    assert "| inverses | 8 | 16 | 1,000 |  |" in page
    assert "| broken |  |  |  | ValueError |" in page


def test_page_of_the_documentation_is_that_of_the_committed_record():
    record = compare.read(ROOT / "benchmarks" / "latest.json")
    assert compare.page(record) == (ROOT / "docs" / "benchmarks.md").read_text()
    assert not [row for rows in record["parts"].values() for row in rows if "error" in row]
    assert f"\n{record['environment']['command']} --out" in compare.page(record)


def test_command(tmp_path, capsys):
    """A dry run of the cheapest part, then the record against itself."""
    out = tmp_path / "new.json"
    record = command.main(["--small", "--parts=scaling", "--limit=300", "--out", str(out)])
    rows = record["parts"]["scaling"]
    words = "python -m benchmarks --parts scaling --limit 300 --small"
    assert record["environment"]["command"] == words
    assert f"\n{words} --out" in out.with_suffix(".md").read_text()
    assert len(rows) == 8 and not [row for row in rows if "error" in row]
    assert "## scaling" in out.with_suffix(".md").read_text()
    again = command.main(["--from", str(out), "--compare", str(out), "--page", str(tmp_path / "p")])
    assert again == json.loads(out.read_text())
    assert "8 ratios and counts, 0 worse, 0 better" in capsys.readouterr().out
    assert (tmp_path / "p").read_text() == out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "a.json", "--small"], "got --small, which has no effect beside --from"),
        (["--from", "a.json", "--parts=scaling"], "got --parts, which has no effect"),
        (["--beyond=2"], "got --beyond, which has no effect beside no --compare"),
    ],
)
def test_words_without_effect_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        command.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_everything(tmp_path):
    record = command.main(["--small", "--out", str(tmp_path / "all.json")])
    rows = [row for part in record["parts"].values() for row in part]
    assert set(record["parts"]) == set(suite.PARTS)
    assert not [row for row in rows if "error" in row or "left_out" in row]
