import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kfac_optax.experiments import compare, sweep, workers
from kfac_optax.experiments.results import Job

ROOT = Path(__file__).parents[2]


def run(config, out: Path) -> tuple[dict, str]:
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        runs = sweep.sweep(config, out, console)
        compare.report(config, out, console, runs)
    return runs, capture.get()


def test_a_sweep_leaves_all_files_and_is_not_repeated(deep_linear, tmp_path, monkeypatch):
    deep_linear.model.depth = 0
    runs, text = run(deep_linear, tmp_path)
    assert set(runs) == {(name, rate) for name in ("sgd", "adam") for rate in (1e-1, 1e-3)}
    assert all(len(group) == 2 for group in runs.values())
    assert {path.name for path in tmp_path.iterdir()} == {
        "runs",
        "summary.csv",
        "loss.png",
        "accuracy.png",
        "seconds.png",
        "tuned_loss.png",
        "tuned_accuracy.png",
    }
    assert {path.name for path in (tmp_path / "runs" / "adam-lr0.1-seed1").iterdir()} == {
        "metrics.csv",
        "run.json",
    }
    assert "[8/8]" in text
    assert "Every optimizer at its best learning rate of 0.1, 0.001" in text

    trained = []

    def interrupted(config, out, jobs, receive):
        trained.extend(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "train_all", interrupted)
    again, text = run(deep_linear, tmp_path)
    assert not trained
    assert "8 runs, 8 done earlier" in text
    assert (
        again["sgd", 1e-3][0].history["train_loss"][-1]
        == runs["sgd", 1e-3][0].history["train_loss"][-1]
    )

    (tmp_path / "runs" / "sgd-lr0.1-seed1" / "run.json").unlink()  # as an interrupt leaves it
    with pytest.raises(KeyboardInterrupt):
        run(deep_linear, tmp_path)
    assert [job.name for job in trained] == ["sgd-lr0.1-seed1"]


def test_a_log_says_how_long_all_runs_and_the_rest_of_them_take(deep_linear, tmp_path, monkeypatch):
    deep_linear.update(optimizers=("sgd", "adam"), seeds=2, tune=False, epochs=10, workers=2)
    monkeypatch.setattr(sweep, "_SILENCE", 0.0)

    def told(config, out, jobs, receive):
        receive(workers.Event(1.0, seconds=2.0, preparation=30.0))
        receive(workers.Event(19.0, seconds=38.0))

    monkeypatch.setattr(workers, "train_all", told)
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        sweep._train(deep_linear, tmp_path, sweep.plan(deep_linear), console)
    # 39 epochs of 2 s and one more compilation of 30 s, on two workers; then 20 epochs
    assert capture.get().splitlines() == [
        "4 runs, about 55 s on 2 workers",
        "1.0 of 40 epochs, about 55 s left",
        "20.0 of 40 epochs, about 36 s left",
    ]


def test_a_log_says_what_may_come_after_these_runs(deep_linear, tmp_path, monkeypatch):
    deep_linear.update(
        optimizers=("sgd", "adam"), seeds=4, tune=True, tune_seeds=1, epochs=10, workers=2
    )

    def told(config, out, jobs, receive):
        receive(workers.Event(1.0, seconds=2.0, preparation=30.0))

    monkeypatch.setattr(workers, "train_all", told)
    console = Console(width=200, force_terminal=False)
    later = sweep._most_further(deep_linear)
    with console.capture() as capture:
        sweep._train(deep_linear, tmp_path, sweep.plan(deep_linear), console, later)
    # three more seeds of both: 60 epochs of 2 s and two compilations of 30 s, on two workers
    assert later == 6
    assert "; then up to 6 at the best rates, about 1 min 30 s more" in capture.get()


def test_other_settings_are_trained_anew(deep_linear, tmp_path):
    deep_linear.update(tune=False, seeds=1, optimizers=("sgd",))
    deep_linear.model.depth = 0
    run(deep_linear, tmp_path)
    deep_linear.epochs = 3
    runs, text = run(deep_linear, tmp_path)
    assert "1 runs, 0 done earlier" in text
    assert len(runs["sgd", 1e-3][0].history["epoch"]) == 3
    assert not (tmp_path / "tuned_loss.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizers": ("sgd", "newton")}, "config.optimizers: got 'newton', expected one of"),
        ({"optimizers": ()}, "config.optimizers: got none, expected at least one"),
        ({"epochs": 0}, "config.epochs: got 0, expected a positive number"),
        ({"seeds": -1}, "config.seeds: got -1, expected a positive number"),
        ({"workers": 0}, "config.workers: got 0, expected a positive number"),
        (
            {"batch_size": 71},
            "config.batch_size: got 71, expected at most the 70 training examples",
        ),
        ({"grid": (1e-3, 0.0)}, "config.grid: got 0.0, expected positive learning rates"),
    ],
)
def test_bad_settings_are_refused(deep_linear, tmp_path, change, message):
    deep_linear.update(change)
    with pytest.raises(ValueError, match=message):
        sweep.sweep(deep_linear, tmp_path, Console())


def test_the_command_takes_overrides_and_several_processes(tmp_path):
    command = [sys.executable, "-m", "kfac_optax.experiments.compare", "--config=configs/digits.py"]
    command += [
        f"--config.out={tmp_path}",
        "--config.optimizers=('sgd','adam')",
        "--config.epochs=1",
    ]
    command += ["--config.seeds=2", "--config.tune=False", "--config.data.train=256"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "[4/4]" in done.stdout
    assert "train acc %" in done.stdout
    assert len(list(tmp_path.glob("runs/*/run.json"))) == 4


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, [5, 3]), (2, [5, 3]), (3, [3, 2, 3]), (6, [1, 1, 1, 1, 1, 3]), (9, [1] * 8)],
)
def test_more_workers_than_optimizers_share_the_runs_of_the_largest(count, sizes):
    jobs = [Job("sgd", 1e-3, seed) for seed in range(3)] + [Job("kfac", 1e-3, s) for s in range(5)]
    groups = workers.grouped(jobs, count)
    assert sorted(job for group in groups for job in group) == sorted(jobs)
    assert all(len({job.optimizer for job in group}) == 1 for group in groups)
    assert len(groups) == max(2, min(count, 8))
    assert groups[0][0].optimizer == "kfac"
