"""All runs of a comparison: several at once, each kept on disk as soon as it is finished."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax
import ml_collections
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kfac_optax.experiments import data, optimizers, results, timing, train
from kfac_optax.experiments.results import Job, Run


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises a `ValueError` for settings that no sweep can be made of."""
    for name in ("seeds", "epochs", "batch_size", "workers", "learning_rate"):
        if not config[name] > 0:
            raise ValueError(f"config.{name}: got {config[name]}, expected a positive number")
    if not config.optimizers:
        raise ValueError("config.optimizers: got none, expected at least one")
    for name in config.optimizers:
        data.select(optimizers.OPTIMIZERS, name, "config.optimizers")
    for rate in config.grid:
        if not rate > 0:
            raise ValueError(f"config.grid: got {rate}, expected positive learning rates")


def plan(config: ml_collections.ConfigDict) -> list[Job]:
    """All runs of a sweep, those at the paper's rate first."""
    rates = dict.fromkeys([config.learning_rate, *(config.grid if config.tune else ())])
    return [
        Job(name, rate, seed)
        for rate in rates
        for seed in range(config.seeds)
        for name in dict.fromkeys(config.optimizers)
    ]


def sweep(
    config: ml_collections.ConfigDict, out: Path, console: Console
) -> tuple[results.Runs, results.Timings]:
    """Trains what is not yet on disk and times the steps; returns everything the tables need."""
    validate(config)
    jobs = plan(config)
    stored = {job: _stored(config, out, job) for job in jobs}
    pending = [job for job in jobs if stored[job] is None]
    timings = timing.load(config, out)
    untimed = [job.optimizer for job in jobs if job.optimizer not in timings]
    console.print(f"{config.name}: {len(jobs)} runs, {len(jobs) - len(pending)} done earlier")
    names = list(dict.fromkeys([job.optimizer for job in pending] + untimed))
    with ThreadPoolExecutor(config.workers) as pool:
        if names:
            console.print(f"compiling {', '.join(names)}")
        prepared = pool.map(lambda name: train.prepare(config, name), names)
        trainers = dict(zip(names, prepared, strict=True))
        stored |= _train(pool, config, out, pending, trainers, console)
    if untimed:
        console.print("timing the steps, one optimizer at a time")
        timing.save(config, out, timing.measure(config, {n: trainers[n] for n in untimed}))
        timings = timing.load(config, out)
    runs: dict[tuple[str, float], list[Run]] = {}
    for job in jobs:
        runs.setdefault((job.optimizer, job.rate), []).append(stored[job])
    return runs, {name: timings[name] for name in dict.fromkeys(config.optimizers)}


def _stored(config: ml_collections.ConfigDict, out: Path, job: Job) -> Run | None:
    return results.load(out / "runs" / job.name, results.run_settings(config, job))


def _train(
    pool: ThreadPoolExecutor,
    config: ml_collections.ConfigDict,
    out: Path,
    jobs: Sequence[Job],
    trainers: dict[str, train.Trainer],
    console: Console,
) -> dict[Job, Run]:
    # Threads are enough to use several cores: XLA lets go of the interpreter while it computes.
    stop = threading.Event()
    progress = _progress(console, show=console.is_terminal and bool(jobs))
    bar = progress.add_task("training", total=len(jobs) * config.epochs)

    def tick(epochs: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        progress.advance(bar, epochs)

    done: dict[Job, Run] = {}
    with progress:
        futures = {
            pool.submit(_run, config, out, job, trainers[job.optimizer], tick): job for job in jobs
        }
        try:
            for future in as_completed(futures):
                job, run = futures[future], future.result()
                done[job] = run
                if not console.is_terminal:
                    line = _line(job, run, done=len(done), total=len(jobs))
                    console.print(line, markup=False, highlight=False)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return done


def _progress(console: Console, *, show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not show,
    )


def _run(
    config: ml_collections.ConfigDict,
    out: Path,
    job: Job,
    trainer: train.Trainer,
    tick: Callable[[int], None],
) -> Run:
    def epochs() -> Iterator[train.Metrics]:
        for metrics in train.run(trainer, config, rate=job.rate, seed=job.seed):
            yield metrics
            tick(1)
        tick(config.epochs - metrics.epoch)  # what a diverged run leaves out

    details = {
        "compile_seconds": round(trainer.compile_seconds, 3),
        "environment": {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "runs_at_once": config.workers,
        },
    }
    settings = results.run_settings(config, job)
    return results.record(out / "runs" / job.name, settings, epochs(), details)


def _line(job: Job, run: Run, *, done: int, total: int) -> str:
    last = {column: values[-1] for column, values in run.history.items()}
    outcome = "diverged" if run.diverged else f"train loss {last['train_loss']:.4f}"
    return (
        f"[{done}/{total}] {job.name}: {outcome}, test accuracy "
        f"{100 * last['test_accuracy']:.2f} %, {run.history['seconds'].sum():.1f} s"
    )
