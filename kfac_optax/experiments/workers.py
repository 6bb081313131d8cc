"""Runs of a sweep in several processes, one optimizer at a time in each."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import logging

from kfac_optax.experiments import results, settings, train
from kfac_optax.experiments.checkpoints import Store
from kfac_optax.experiments.folder import Stopped, writing
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
    """Trains all `jobs`; an optimizer is compiled once in every process that has some of its runs.

    That is one process, unless there are more of them than optimizers.

    Args:
        config: the experiment; with `workers=1` everything happens in this process.
        out: directory of the results.
        jobs: the runs to make.
        receive: called in this process with every event.

    Raises:
        Stopped: some runs failed, after all the others were made; or nothing can be written.
    """
    groups = grouped(jobs, config.workers)
    if config.workers == 1:
        failed = []
        for group in groups:
            failed += _train_optimizer(config, out, group, receive)
    else:
        failed = _in_processes(config, out, groups, receive)
    if failed:
        raise Stopped(
            f"{len(failed)} of {len(jobs)} runs failed, the others are finished and kept:\n"
            + "\n".join(failed)
            + "\nThe same command makes the missing ones."
        )


def grouped(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Runs of one optimizer each, to be made one after another; as many groups as workers, where
    there are so many runs.
    """
    by_name: dict[str, list[Job]] = {}
    # The longest first, so that no process is left alone with one of them at the end.
    for job in sorted(jobs, key=lambda job: not OPTIMIZERS[job.optimizer].curvature):
        by_name.setdefault(job.optimizer, []).append(job)
    groups = list(by_name.values())
    # more workers than optimizers: halves of the largest groups
    for _ in range(min(workers, len(jobs)) - len(groups)):
        largest = max(groups, key=len)
        middle = len(largest) // 2
        place = groups.index(largest)
        groups[place : place + 1] = [largest[:middle], largest[middle:]]
    return groups


def _in_processes(
    config: ml_collections.ConfigDict, out: Path, groups: Sequence[list[Job]], receive: Receive
) -> list[str]:
    """Trains the groups; a line for every run that failed."""
    failed: list[str] = []
    # Not threads: in jaxlib 0.10.2 two batched LAPACK calls (eigh, Cholesky) that run at the same
    # time can each hold a thread of XLA's pool while they wait for a free one, for ever.
    context = multiprocessing.get_context("spawn")
    events = context.SimpleQueue()
    size = min(config.workers, len(groups))
    with ProcessPoolExecutor(size, context, _enter_process, (events,)) as pool:
        with _single_threads():
            pending = {pool.submit(_in_process, config, out, group) for group in groups}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                _drain(events, receive)
                for future in done:
                    failed += future.result()
        except BrokenProcessPool as error:
            raise Stopped(
                f"{error} What is finished is kept, and the same command goes on. If memory was "
                "short, pass fewer --config.workers."
            ) from error
        except BaseException:
            # At any time: only `run.json`, written last, makes a run count.
            for child in multiprocessing.active_children():
                child.terminate()
            pool.shutdown(cancel_futures=True)
            raise
        _drain(events, receive)
    return failed


def _drain(events: Any, receive: Receive) -> None:
    while not events.empty():
        receive(events.get())


# of XLA's pools, and of the libraries that SciPy, whose LAPACK JAX calls on a CPU, may have been
# built with
_THREADS = ("NPROC", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
_process: dict[str, Any] = {}  # what a worker process was started with; empty in the main process


@contextlib.contextmanager
def _single_threads() -> Iterator[None]:
    """One thread for each run in the processes that are started meanwhile, in XLA and in LAPACK.

    Threads of several runs that wait for each other cost ten times the work and more. LAPACK reads
    its number when SciPy is imported, in a worker before any code of ours, so that it has to be in
    the environment that the process starts with. What is there already goes first.
    """
    added = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _enter_process(events: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    main = multiprocessing.parent_process()
    assert main is not None  # only ever called in a process of the pool
    # not `os.getppid()`, which is another one where the main process has ended by now
    threading.Thread(target=_end_with, args=(main.pid,), daemon=True).start()
    _process["events"] = events


def _end_with(parent: int | None) -> None:
    """Ends this process soon after the main one, which has let go of the folder by then."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _in_process(config: ml_collections.ConfigDict, out: Path, jobs: Sequence[Job]) -> list[str]:
    return _train_optimizer(config, out, jobs, _process["events"].put)


def _train_optimizer(
    config: ml_collections.ConfigDict, out: Path, jobs: Sequence[Job], send: Receive
) -> list[str]:
    """Makes the runs of one optimizer; a line for every one that failed."""
    config = settings.of(config, jobs[0].optimizer)
    began = time.monotonic()
    try:
        trainer = train.prepare(config, jobs[0].optimizer)
    except Exception as error:
        # nor does one optimizer about the others
        return [_failed(job, error, send) for job in jobs]
    details = {
        "steps_per_epoch": trainer.steps,
        "compile_seconds": round(trainer.compile_seconds, 3),
        "state_bytes": trainer.state_bytes,
        "parameter_bytes": trainer.parameter_bytes,
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

    failed: list[str] = []
    for job in jobs:
        try:
            _train_job(config, out, job, trainer, details, send_first)
        except Stopped:  # no other run could be written either
            raise
        except Exception as error:
            # one seed says nothing about the others
            failed.append(_failed(job, error, send_first))
    return failed


def _failed(job: Job, error: Exception, send: Receive) -> str:
    logging.error("%s failed", job.name, exc_info=error)
    send(Event(0.0, job, "failed"))
    return f"{job.name}: {type(error).__name__}: {error}"


def _train_job(
    config: ml_collections.ConfigDict,
    out: Path,
    job: Job,
    trainer: train.Trainer,
    details: dict[str, Any],
    send: Receive,
) -> None:
    directory = out / "runs" / job.name
    with writing(directory):
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
