import csv
import json
import math

import numpy as np
import pytest
from scipy import stats

from kfac_optax.experiments import plots, results, tables, train
from kfac_optax.experiments.results import Job, Run

RATE = 1e-3


def make_run(*loss: float, seconds: float = 0.5) -> Run:
    n = len(loss)
    columns = {"epoch": np.arange(1.0, n + 1), "train_loss": np.array(loss), "seconds": np.full(n, seconds)}
    for name in ("train_accuracy", "test_accuracy"):
        columns[name] = np.linspace(0.5, 0.9, n)
    return Run(not math.isfinite(loss[-1]), 10, {**columns, "test_loss": np.array(loss)})


@pytest.fixture
def runs():
    diverged = make_run(2.0, math.nan)
    return {
        ("sgd", RATE): [make_run(1.0, 0.5, 0.3), make_run(1.0, 0.6, 0.15)],
        ("two_level", RATE): [make_run(0.5, 0.1, 0.05), diverged],
        ("sgd", 1e-1): [make_run(1.0, 0.2, 0.01), diverged],
        ("two_level", 1e-1): [make_run(0.4, 0.1, 0.02), make_run(0.3, 0.05, 0.01)],
    }


def metrics(*loss: float):
    return [train.Metrics(i + 1, value, 0.5, value, 0.5, 0.1) for i, value in enumerate(loss)]


def test_interval_is_that_of_the_t_test():
    values = [1.0, 2.0, 4.0, 8.0]
    mean, half = results.interval(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert results.interval([3.0])[0] == 3.0
    assert math.isnan(results.interval([3.0])[1])


def test_a_recorded_run_is_read_back(tmp_path):
    settings = {"epochs": 2, "optimizer": "sgd"}
    run = results.record(tmp_path, settings, metrics(0.5, 0.25), {"steps_per_epoch": 7})
    assert not run.diverged
    assert run.steps == 7
    np.testing.assert_allclose(run.history["train_loss"], [0.5, 0.25])
    assert results.load(tmp_path, {"epochs": 3, "optimizer": "sgd"}) is None
    with open(tmp_path / "metrics.csv") as file:
        assert next(csv.reader(file)) == list(train.Metrics._fields)
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == settings
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_run_does_not_count(tmp_path):
    def interrupted():
        yield metrics(0.5)[0]
        raise KeyboardInterrupt

    results.record(tmp_path, {"epochs": 1}, metrics(0.5), {"steps_per_epoch": 7})
    with pytest.raises(KeyboardInterrupt):
        results.record(tmp_path, {"epochs": 1}, interrupted(), {"steps_per_epoch": 7})
    assert (tmp_path / "metrics.csv").exists()
    assert results.load(tmp_path, {"epochs": 1}) is None


def test_a_diverged_run_is_a_result(tmp_path):
    run = results.record(tmp_path, {}, metrics(0.5, math.nan), {"steps_per_epoch": 7})
    assert run.diverged
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["status"] == "diverged"
    assert stored["final"]["train_loss"] is None


def test_settings_of_a_run_leave_out_the_sweep(deep_linear):
    before = results.run_settings(deep_linear, Job("sgd", RATE, 0))
    deep_linear.update(seeds=9, grid=(1.0,), tune=False, out="elsewhere", workers=7)
    deep_linear.kfac.damping = 7.0
    assert results.run_settings(deep_linear, Job("sgd", RATE, 0)) == before
    assert results.run_settings(deep_linear, Job("kfac", RATE, 0))["kfac"]["damping"] == 7.0
    deep_linear.epochs = 99
    assert results.run_settings(deep_linear, Job("sgd", RATE, 0)) != before


def test_the_best_rate_did_not_diverge(runs):
    assert results.best_rate(runs, "sgd") == RATE
    assert results.best_rate(runs, "two_level") == 1e-1


def test_cost_counts_epochs_and_seconds_where_the_loss_was_reached(runs):
    epochs, seconds = results.cost_of(runs["sgd", RATE], 0.55)
    assert epochs == [2, 3]
    np.testing.assert_allclose(seconds, [1.0, 1.5])
    assert results.cost_of(runs["sgd", RATE], 0.2) == ([3], [1.5])
    np.testing.assert_allclose(results.ms_per_step(runs["sgd", RATE]), [50.0, 50.0])


def test_summary_has_one_row_per_optimizer_and_rate(tmp_path, runs):
    results.write_summary(tmp_path / "summary.csv", runs, targets=(0.2,))
    with open(tmp_path / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["optimizer"], float(row["learning_rate"])) for row in rows] == [
        ("sgd", 1e-1), ("sgd", RATE), ("two_level", 1e-1), ("two_level", RATE),
    ]  # fmt: skip
    np.testing.assert_allclose([float(row["train_loss"]) for row in rows], [0.01, 0.225, 0.015, 0.05])
    assert [row["diverged"] for row in rows] == ["1", "0", "0", "1"]
    assert [row["reached_0.2"] for row in rows] == ["1", "1", "2", "1"]


def rendered(table) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_tell_divergence_and_what_was_not_reached(runs):
    at_rate = {key: group for key, group in runs.items() if key[1] == RATE}
    text = rendered(tables.fixed_rate(at_rate, workers=1))
    assert "0.0500 (1 of 2 diverged)" in text
    assert "0.2250 ± 0.9530" in text
    text = rendered(tables.tuned(runs, targets=(0.2, 1e-9)))
    assert "- (1/2)" in text  # SGD reached 0.2 with one seed of two
    assert "1.50 s" not in text
    assert "2.0 ep" in text
    assert "- (0/2)" in text
    text = rendered(tables.fixed_rate({("sgd", RATE): [make_run(math.nan)]}, workers=2))
    assert "diverged" in text


def test_figures_are_drawn_with_and_without_divergence(tmp_path, runs):
    at_rate = {key: group for key, group in runs.items() if key[1] == RATE}
    plots.loss(tmp_path / "loss.png", at_rate, title="title")
    plots.scores(tmp_path / "accuracy.png", at_rate, title="title")
    plots.tuned_loss(tmp_path / "tuned.png", runs, title="title")
    lost = {("sgd", RATE): [make_run(1.0, math.nan)]}
    plots.loss(tmp_path / "lost.png", lost, title="title")
    plots.scores(tmp_path / "lost_accuracy.png", lost, title="title")
    assert len(list(tmp_path.glob("*.png"))) == 5
