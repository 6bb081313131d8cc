"""Several experiments in one table."""

import math

import numpy as np
import pytest
from rich.console import Console

from kfac_optax.experiments import suite, sweep
from kfac_optax.experiments.results import Run
from tests.experiments.conftest import read_config


def small():
    config = read_config("suite")
    config.update(
        problems=("deep_tanh", "fashion_mnist_cnn"), optimizers=("sgd", "kfac", "two_level")
    )
    config.update(seeds=2, grid=(1e-1,), workers=1)
    config.experiments.deep_tanh.update(epochs=1, batch_size=16)
    config.experiments.deep_tanh.data.update(train=32, test=8)
    config.experiments.deep_tanh.model.widths = (4,)
    return config


def test_a_suite_reports_and_is_not_repeated(tmp_path):
    console = Console(width=150, force_terminal=False)
    texts = []
    for _ in range(2):
        with console.capture() as capture:
            suite.suite(small(), tmp_path, console)
        texts.append(capture.get())
    first, again = texts
    assert "left out, they need the files of Fashion-MNIST: fashion_mnist_cnn" in first
    assert "two-level K-FAC against K-FAC" in first
    assert "of 1 problems, worse on" in first
    # the two presets at their own rate, SGD at its own with both seeds and at another with one
    assert "7 runs, 0 done earlier" in first
    assert "7 runs, 7 done earlier" in again
    assert len((tmp_path / "suite.csv").read_text().splitlines()) == 4
    assert (tmp_path / "suite.png").exists()


def test_presets_are_not_tuned_and_settings_of_the_suite_hold_for_all():
    config = small()
    jobs = sweep.plan(suite.experiment_of(config, "deep_tanh"))
    assert {job.rate for job in jobs if job.optimizer == "sgd"} == {1e-2, 1e-1}
    assert {job.rate for job in jobs if job.optimizer == "two_level"} == {1e-2}
    config.data_dir = "/some/where"
    assert suite.experiment_of(config, "fashion_mnist_cnn").data.data_dir == "/some/where"
    with pytest.raises(ValueError, match="config.problems: got 'cifar', expected one of"):
        suite.experiment_of(config, "cifar")


def test_pairs_are_by_seed_and_a_diverged_run_ends_above():
    def group(*losses):
        return [Run(math.isnan(loss), 1, {"train_loss": np.array([loss])}) for loss in losses]

    runs = {("kfac", 0.1): group(1.0, 2.0, 3.0), ("two_level", 0.1): group(0.5, 2.5, 3.0)}
    assert suite.pair(runs, "two_level") == suite.Pair(below=1, above=1, seeds=3, ratio=1.0)
    runs["two_level", 0.1] = group(0.5, math.nan, 2.0)
    diverged = suite.pair(runs, "two_level")
    assert (diverged.below, diverged.above) == (2, 1)
    assert math.isnan(diverged.ratio)
    assert suite.pair(runs, "two_level_adaptive") is None
