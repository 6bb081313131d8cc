import csv
import json
import math
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from kfac_optax.experiments import plots, results, tables, train
from kfac_optax.experiments.results import Job, Run

RATE = 1e-3


def make_run(*loss: float, seconds: float = 0.5) -> Run:
    n = len(loss)
    columns = {
        "epoch": np.arange(1.0, n + 1),
        "train_loss": np.array(loss),
        "seconds": np.full(n, seconds),
    }
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
        ("sgd", 1e-1),
        ("sgd", RATE),
        ("two_level", 1e-1),
        ("two_level", RATE),
    ]
    np.testing.assert_allclose(
        [float(row["train_loss"]) for row in rows], [0.01, 0.225, 0.015, 0.05]
    )
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


def test_the_table_tells_the_worst_seed_and_how_often_the_loss_rose():
    calm, rough = make_run(1.0, 0.5, 0.7), make_run(1.0, 1.6, 0.1, 0.2)
    assert [results.rises(run) for run in (calm, rough, make_run(1.0, math.nan))] == [0, 2, 1]
    assert results.worst([calm, rough]) == 0.7
    lines = rendered(tables.fixed_rate({("sgd", RATE): [calm, rough]}, workers=1)).splitlines()
    row = next(line for line in lines if "SGD" in line)
    assert " 0.7000 " in row and " 1.0 (2) " in row
    lost = rendered(tables.fixed_rate({("sgd", RATE): [calm, make_run(1.0, math.nan)]}, workers=1))
    assert re.search(r"1 of 2 diverged\) +diverged +0.5 \(1\)", lost)
    parts = calm._replace(history=calm.history | {"epoch": np.array([0.5, 1.0, 1.5])})
    assert "rises" not in rendered(tables.fixed_rate({("sgd", RATE): [parts]}, workers=1)).lower()


def test_every_rate_that_was_tried_is_in_a_table(runs):
    runs["adam", 1e-2] = [make_run(1.0, math.nan)]
    text = rendered(tables.every_rate(runs))
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert ["optimizer", "0.1", "0.01", "0.001"] in rows
    assert ["SGD", "0.0100 (2)", "-", "0.2250 (2)"] in rows
    assert ["two-level K-FAC", "0.0150 (2)", "-", "0.0500 (2)"] in rows
    assert ["Adam", "-", "diverged (1)", "-"] in rows
    assert ["diverged", "0.3000"] in rows and ["0.0200", "diverged"] in rows


def test_every_seed_is_a_thin_line_and_their_mean_a_thick_one(runs):
    axes = Figure().subplots()
    plots._curve(axes, runs["sgd", RATE], "train_loss", "sgd")
    drawn = {(line.get_linewidth() > 1, tuple(line.get_ydata())) for line in axes.get_lines()}
    seeds = {(False, tuple(run.history["train_loss"])) for run in runs["sgd", RATE]}
    mean = np.mean([run.history["train_loss"] for run in runs["sgd", RATE]], axis=0)
    assert drawn == {(True, tuple(mean)), *seeds}


def test_figures_are_drawn_with_and_without_divergence(tmp_path, runs):
    at_rate = {key: group for key, group in runs.items() if key[1] == RATE}
    plots.loss(tmp_path / "loss.png", at_rate, title="title")
    plots.scores(tmp_path / "accuracy.png", at_rate, title="title")
    plots.tuned_loss(tmp_path / "tuned.png", runs, title="title")
    lost = {("sgd", RATE): [make_run(1.0, math.nan)]}
    plots.loss(tmp_path / "lost.png", lost, title="title")
    plots.scores(tmp_path / "lost_accuracy.png", lost, title="title")
    assert len(list(tmp_path.glob("*.png"))) == 5
