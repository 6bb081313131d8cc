"""Runs of a sweep in several processes, one optimizer at a time in each."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from kfac_optax.experiments import results, settings, train
from kfac_optax.experiments.checkpoints import Store
from kfac_optax.experiments.optimizers import OPTIMIZERS
from kfac_optax.experiments.results import Job


class Event(NamedTuple):
    """News of a run.

    Attributes:
        epochs: that need no more waiting for, or what part of one.
        job: the run, when it is over.
        outcome: of it, in words.
        seconds: that the epochs took, 0 where they were not trained.
        preparation: seconds of compiling, with the first event of an optimizer.
    """

    epochs: float
    job: Job | None = None
    outcome: str = ""
    seconds: float = 0.0
    preparation: float = 0.0


Receive = Callable[[Event], None]


def train_all(
    config: ml_collections.ConfigDict, out: Path, jobs: Sequence[Job], receive: Receive
) -> None:
    """Trains all `jobs`; every optimizer is compiled once, in the process that has all its runs.

    Args:
        config: the experiment; with `workers=1` everything happens in this process.
        out: directory of the results.
        jobs: the runs to make.
        receive: called in this process with every event.
    """
    groups: dict[str, list[Job]] = {}
    # The longest first, so that no process is left alone with one of them at the end.
    for job in sorted(jobs, key=lambda job: not OPTIMIZERS[job.optimizer].curvature):
        groups.setdefault(job.optimizer, []).append(job)
    if config.workers == 1:
        for group in groups.values():
            _train_optimizer(config, out, group, receive)
    else:
        _in_processes(config, out, list(groups.values()), receive)


def _in_processes(
    config: ml_collections.ConfigDict, out: Path, groups: Sequence[list[Job]], receive: Receive
) -> None:
    # Not threads: in jaxlib 0.10.2 two batched LAPACK calls (eigh, Cholesky) that run at the same
    # time can each hold a thread of XLA's pool while they wait for a free one, for ever.
    context = multiprocessing.get_context("spawn")
    events = context.SimpleQueue()
    size = min(config.workers, len(groups))
    with ProcessPoolExecutor(size, context, _enter_process, (events,)) as pool:
        pending = {pool.submit(_in_process, config, out, group) for group in groups}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                _drain(events, receive)
                for future in done:
                    future.result()
        except BaseException:
            # At any time: only `run.json`, written last, makes a run count.
            for child in multiprocessing.active_children():
                child.terminate()
            pool.shutdown(cancel_futures=True)
            raise
        _drain(events, receive)


def _drain(events: Any, receive: Receive) -> None:
    while not events.empty():
        receive(events.get())


_process: dict[str, Any] = {}  # what a worker process was started with; empty in the main process


def _enter_process(events: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    os.environ.setdefault("NPROC", "1")  # XLA's thread pools: one thread for each run
    _process["events"] = events


def _in_process(config: ml_collections.ConfigDict, out: Path, jobs: Sequence[Job]) -> None:
    _train_optimizer(config, out, jobs, _process["events"].put)


def _train_optimizer(
    config: ml_collections.ConfigDict, out: Path, jobs: Sequence[Job], send: Receive
) -> None:
    config = settings.of(config, jobs[0].optimizer)
    began = time.monotonic()
    trainer = train.prepare(config, jobs[0].optimizer)
    details = {
        "steps_per_epoch": trainer.steps,
        "compile_seconds": round(trainer.compile_seconds, 3),
        "environment": {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "workers": config.workers,
        },
    }
    preparation = time.monotonic() - began

    def send_first(event: Event) -> None:
        nonlocal preparation
        send(event._replace(preparation=preparation))
        preparation = 0.0

    for job in jobs:
        _train_job(config, out, job, trainer, details, send_first)


def _train_job(
    config: ml_collections.ConfigDict,
    out: Path,
    job: Job,
    trainer: train.Trainer,
    details: dict[str, Any],
    send: Receive,
) -> None:
    directory = out / "runs" / job.name
    directory.mkdir(parents=True, exist_ok=True)
    identity = results.run_settings(config, job)
    # By default only what would take long to repeat is kept.
    every: Any = config.get("checkpoint_every", 0)
    seconds: Any = config.get("checkpoint_seconds", 60)
    store = Store(directory / "checkpoint.npz", identity, epochs=every, seconds=seconds)
    finished, said = 0.0, time.monotonic()

    def progress(epochs: float) -> None:
        nonlocal finished, said
        finished += epochs
        now = time.monotonic()
        send(Event(epochs, seconds=now - said))
        said = now

    metrics = train.run(
        trainer, config, rate=job.rate, seed=job.seed, store=store, progress=progress
    )
    run = results.record(directory, identity, metrics, details)
    store.remove()
    outcome = results.outcome(run)
    # what a diverged run leaves out, or a rounding error
    send(Event(config.epochs - finished, job, outcome))
