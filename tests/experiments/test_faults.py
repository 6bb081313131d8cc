"""What a sweep does where something around it breaks: it goes on, or stops in words, and keeps what
is finished. Nothing is trained here.
"""

import concurrent.futures
import json
import logging
import math
import os
import types
from concurrent.futures.process import BrokenProcessPool

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from rich.console import Console

from kfac_optax.experiments import compare, folder, results, sweep, train, workers
from kfac_optax.experiments.checkpoints import Position, Store
from kfac_optax.experiments.folder import Stopped
from kfac_optax.experiments.results import Job

FULL = "/dev/full"  # a disk without room, for whoever writes to it
SETTINGS = {"epochs": 2}


def metrics(*loss):
    return [train.Metrics(i + 1, value, 0.5, value, 0.5, 0.1) for i, value in enumerate(loss)]


def record(directory, *loss):
    return results.record(directory, SETTINGS, metrics(*loss), {"steps_per_epoch": 7})


@pytest.fixture
def warnings(caplog):
    """Warnings of the experiments, as text."""
    logger = absl_logging.get_absl_logger()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


def test_a_full_disk_keeps_what_was_written_before(tmp_path):
    path = tmp_path / "summary.json"
    results.write_json(path, {"a": 1})
    (tmp_path / "summary.tmp").symlink_to(FULL)
    with pytest.raises(Stopped, match=f"{path}: cannot be written .No space left on device"):
        results.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    table = tmp_path / "summary.csv"
    results.write_rows(table, [{"a": 1.0}])
    (tmp_path / "summary.tmp").symlink_to(FULL)
    with pytest.raises(Stopped, match="summary.csv: cannot be written"):
        results.write_rows(table, [{"a": 2.0}])
    assert table.read_text().split() == ["a", "1"]


def full_disk(monkeypatch, after=0):
    """Rows of a run go to a disk without room, after so many of them."""
    append, rows = results._append, []

    def appended(path, cells):
        rows.append(path)
        if len(rows) > after:
            path = path.with_name("full")
            path.unlink(missing_ok=True)
            path.symlink_to(FULL)
        append(path, cells)

    monkeypatch.setattr(results, "_append", appended)


def test_a_run_on_a_full_disk_does_not_count(tmp_path, monkeypatch):
    record(tmp_path, 0.5)
    full_disk(monkeypatch, after=2)
    with pytest.raises(Stopped, match="full: cannot be written .No space left"):
        record(tmp_path, 0.4, 0.3)
    assert results.load(tmp_path, SETTINGS) is None


def test_training_goes_on_where_a_checkpoint_cannot_be_written(tmp_path, warnings):
    state = {"w": jnp.arange(3.0)}
    store = Store(tmp_path / "checkpoint.npz", SETTINGS, epochs=1, seconds=0)
    store.write(Position(step=1), state)
    (tmp_path / "checkpoint.tmp").symlink_to(FULL)
    store.write(Position(step=2), state)
    assert "checkpoint.npz: not written (No space left on device), training goes on" in warnings()
    assert store.read(state)[0].step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]
    store.write(Position(step=3), state)  # there is room again
    assert store.read(state)[0].step == 3


def test_a_folder_that_cannot_be_written_to_stops_before_anything_is_trained(
    deep_linear, tmp_path, monkeypatch
):
    monkeypatch.setattr(workers, "train_all", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(Stopped, match="out: cannot be written .Not a directory"):
        sweep.sweep(deep_linear, tmp_path / "file" / "out", Console(quiet=True))

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder, "open", refused, raising=False)
    with pytest.raises(Stopped, match="cannot be written .Permission denied"):
        sweep.sweep(deep_linear, tmp_path / "out", Console(quiet=True))


def test_two_sweeps_do_not_share_a_folder(deep_linear, tmp_path):
    console = Console(width=200)
    with folder.claimed(tmp_path):
        with console.capture() as capture, pytest.raises(SystemExit) as ended:
            compare.experiment(deep_linear, tmp_path, console)
        assert ended.value.code == 1
        words = f"{tmp_path}: process {os.getpid()} on "
        assert capture.get().startswith(words)
        assert "is writing there. Wait for it, or pass another --config.out." in capture.get()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".in_use").write_text("left by a process that was killed, with its lock")
    with folder.claimed(tmp_path), pytest.raises(Stopped), folder.claimed(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    lock, calls = folder._lock, []

    def removed_first(file):
        calls.append(file)
        if len(calls) == 1:  # by the sweep that ends between `open` and `flock`
            (tmp_path / ".in_use").unlink()
        return lock(file)

    monkeypatch.setattr(folder, "_lock", removed_first)
    with folder.claimed(tmp_path):
        assert len(calls) == 2
        monkeypatch.setattr(folder, "_lock", lock)
        with pytest.raises(Stopped), folder.claimed(tmp_path):
            pass


def damage(kind, directory):
    marker, table = directory / "run.json", directory / "metrics.csv"
    rows = table.read_text().splitlines(keepends=True)
    words = json.loads(marker.read_text())
    if kind == "half a marker":
        marker.write_text(marker.read_text()[:-40])
    elif kind == "no text":
        marker.write_bytes(bytes(range(256)))
    elif kind == "another value":
        marker.write_text("[1, 2]")
    elif kind == "an entry less":
        marker.write_text(json.dumps({k: v for k, v in words.items() if k != "status"}))
    elif kind == "a row less":
        table.write_text("".join(rows[:-1]))
    elif kind == "half a row":
        table.write_text("".join(rows)[:-8])
    elif kind == "no numbers":
        table.write_text("".join(rows).replace("0.5", "half"))
    elif kind == "no rows":
        table.write_text("")


KINDS = (
    "half a marker",
    "no text",
    "another value",
    "an entry less",
    "a row less",
    "half a row",
    "no numbers",
    "no rows",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_run_is_made_again(kind, tmp_path, warnings):
    record(tmp_path, 0.5, 0.25)
    assert results.load(tmp_path, SETTINGS) is not None
    damage(kind, tmp_path)
    assert results.load(tmp_path, SETTINGS) is None
    assert f"{tmp_path}: damaged, the run is made again" in warnings()
    record(tmp_path, 0.5, 0.25)
    assert results.load(tmp_path, SETTINGS) is not None


def test_a_run_without_its_table_is_made_again(tmp_path):
    record(tmp_path, 0.5, 0.25)
    (tmp_path / "metrics.csv").unlink()
    assert results.load(tmp_path, SETTINGS) is None


@pytest.fixture
def stub(monkeypatch):
    """A sweep that trains nothing; `stub.faults` says what seeds and optimizers do instead."""
    made = types.SimpleNamespace(faults={}, runs=[])

    def prepare(config, name):
        if name in made.faults:
            raise made.faults[name]
        sizes = {"state_bytes": 0, "parameter_bytes": 0}
        return types.SimpleNamespace(steps=7, compile_seconds=0.0, name=name, **sizes)

    def run(trainer, config, *, rate, seed, store, progress):
        made.runs.append((trainer.name, seed))
        fault = made.faults.get(seed)
        if isinstance(fault, Exception):
            raise fault
        yield from metrics(0.5 if fault is None else fault)

    monkeypatch.setattr(train, "prepare", prepare)
    monkeypatch.setattr(train, "run", run)
    return made


@pytest.fixture
def config(deep_linear):
    deep_linear.update(optimizers=("sgd", "adam"), seeds=3, tune=False, epochs=1)
    return deep_linear


def test_a_dead_seed_leaves_the_others_alone(config, tmp_path, stub):
    stub.faults = {1: FloatingPointError("no numbers"), 2: math.nan}
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture, pytest.raises(Stopped) as stopped:
        sweep.sweep(config, tmp_path, console)
    words = str(stopped.value)
    assert words.startswith("2 of 6 runs failed, the others are finished and kept:")
    assert "sgd-lr0.001-seed1: FloatingPointError: no numbers" in words
    assert "adam-lr0.001-seed1: failed" in capture.get()
    assert "seed2: diverged" in capture.get()
    stub.faults, stub.runs = {}, []
    runs = sweep.sweep(config, tmp_path, Console(quiet=True))
    assert stub.runs == [("sgd", 1), ("adam", 1)]
    assert [run.diverged for run in runs["sgd", 1e-3]] == [False, False, True]


def test_an_optimizer_that_cannot_be_compiled_leaves_the_others_alone(config, tmp_path, stub):
    stub.faults = {"sgd": MemoryError("too large")}
    with pytest.raises(Stopped, match="3 of 6 runs failed") as stopped:
        sweep.sweep(config, tmp_path, Console(quiet=True))
    assert str(stopped.value).count("MemoryError: too large") == 3
    assert stub.runs == [("adam", seed) for seed in range(3)]


def test_a_full_disk_stops_a_sweep_at_once(config, tmp_path, stub, monkeypatch):
    full_disk(monkeypatch, after=2)  # the names of the columns, and a row
    with pytest.raises(Stopped, match="seed1/full: cannot be written"):
        sweep.sweep(config, tmp_path, Console(quiet=True))
    assert stub.runs == [("sgd", 0), ("sgd", 1)]
    assert (tmp_path / "runs" / "sgd-lr0.001-seed0" / "run.json").exists()


class BrokenPool:
    """A pool whose first process has died."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, *_):
        future = concurrent.futures.Future()
        future.set_exception(BrokenProcessPool("A process was terminated abruptly."))
        return future


def test_a_dead_worker_stops_in_words(config, tmp_path, monkeypatch):
    config.workers = 2
    monkeypatch.setattr(workers, "ProcessPoolExecutor", BrokenPool)
    with pytest.raises(Stopped, match=r"terminated abruptly. What is finished is kept.*workers"):
        workers.train_all(config, tmp_path, [Job("sgd", 1e-3, 0)], lambda event: None)


def test_a_worker_ends_with_its_main_process(monkeypatch):
    parents, ended = iter([5, 5, 1]), []
    monkeypatch.setattr(workers.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(workers.os, "_exit", ended.append)
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: None)
    workers._end_with(5)
    assert ended == [1]


def test_a_worker_knows_its_main_process_where_that_has_ended_already(monkeypatch):
    # a worker takes seconds to start
    started = []
    monkeypatch.setattr(
        workers.multiprocessing, "parent_process", lambda: types.SimpleNamespace(pid=5)
    )
    monkeypatch.setattr(
        workers.threading, "Thread", lambda **words: started.append(words) or Started()
    )
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(workers, "_process", {})
    workers._enter_process(None)
    assert started[0]["args"] == (5,)


def test_workers_start_with_one_thread_of_lapack(monkeypatch):
    """LAPACK has read the number before any function is called in the worker."""
    for name in workers._THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "2")  # what is there already goes first
    before, seen = dict(workers.os.environ), []

    class Pool:
        __enter__ = lambda self: self
        __exit__ = lambda self, *_: None

        def submit(self, *_):  # where processes are started
            seen.append({name: workers.os.environ.get(name) for name in workers._THREADS})
            future = concurrent.futures.Future()
            future.set_result([])
            return future

    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *_: Pool())
    config = types.SimpleNamespace(workers=2)
    assert workers._in_processes(config, None, [[], []], seen.append) == []
    assert seen == [dict.fromkeys(workers._THREADS, "1") | {"MKL_NUM_THREADS": "2"}] * 2
    assert dict(workers.os.environ) == before  # the main process keeps its threads


class Started:
    def start(self):
        pass


def test_a_checkpoint_with_another_header_is_left_alone(tmp_path, warnings):
    store = Store(tmp_path / "checkpoint.npz", SETTINGS, epochs=1, seconds=0)
    np.savez(tmp_path / "checkpoint.npz", header=np.array("[1]"))
    assert store.read({"w": jnp.zeros(1)}) is None
    assert "not used, the run starts anew" in warnings()
