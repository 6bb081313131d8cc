"""Training loop: an epoch is one or more calls of a function that is compiled once per optimizer."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from kfac_optax.experiments import data, steps
from kfac_optax.experiments.checkpoints import Position, Store
from kfac_optax.experiments.steps import State
from kfac_optax.experiments.trainer import ErrorMetrics, Metrics, Trainer, prepare, start

__all__ = ["ErrorMetrics", "Metrics", "Trainer", "prepare", "run", "start"]


def run(
    trainer: Trainer,
    config: ml_collections.ConfigDict,
    *,
    rate: float,
    seed: int,
    store: Store | None = None,
    progress: Callable[[float], None] = lambda epochs: None,
) -> Iterator[Metrics | ErrorMetrics]:
    """Trains and yields one row after another; stops at a non-finite loss, or when the budget of
    seconds is spent.

    Args:
        trainer: from `prepare`.
        config: the experiment.
        rate: the learning rate.
        seed: of data, weights and everything else random.
        store: where the state is kept; a run found there goes on, its earlier rows are yielded
          again.
        progress: told after every call of compiled code how many epochs, or what part of one, it
          took off.

    Yields:
        One row for every epoch; with `config.report_every=k` one after every `k` steps of it as
        well.
    """
    dataset, key = start(config, seed=seed)
    rate_array = jnp.float32(rate)
    done, state, reports = _begin(trainer, trainer.init(rate_array, key, dataset), store)
    rows = [trainer.metrics(*row) for row in done.rows]
    epochs, reported = _steps_reported(rows, trainer)
    if epochs or done.step:
        progress(epochs + done.step / trainer.steps)
    # rows of a run that goes on are handed out once more
    yield from rows
    jax.block_until_ready((state, dataset))
    step, seconds = done.step, done.seconds
    while epochs < config.epochs:
        # again for the rest of an epoch: the key stays until its end
        drawn = trainer.shuffle(state.key)
        while step < trainer.steps:
            # a call ends at a row, or when it has lasted for so many steps
            end = _call_end(trainer, config, step)
            began = time.perf_counter()
            state, reports = jax.block_until_ready(
                trainer.train(rate_array, state, reports, dataset, drawn, step, end)
            )
            # evaluation and files do not count
            seconds += time.perf_counter() - began
            progress((end - step) / trainer.steps)
            step = end
            if not _reports(trainer, config, step):
                _keep(store, Position(rows, step, seconds), state, reports)
                continue
            # mean over the mini-batches since the row before
            loss, score = map(float, _mean(reports, reported, step))
            state = state._replace(key=drawn.next_key) if step == trainer.steps else state
            row = trainer.metrics(
                epochs + step / trainer.steps, loss, score, math.nan, math.nan, seconds
            )
            over = _over(config, rows, row)
            rows.append(_evaluated(trainer, config, rows, row, state, dataset, over))
            reported, seconds = step % trainer.steps, 0.0
            if not over:
                _keep(store, Position(rows, reported), state, reports)
            yield rows[-1]
            if over:
                return
        epochs, step = epochs + 1, 0


_mean = jax.jit(steps.mean_report)


def _begin(
    trainer: Trainer, state: State, store: Store | None
) -> tuple[Position, State, jax.Array]:
    """Where a run begins: at its first state, or at what the store has of it."""
    reports = jnp.zeros((trainer.steps, 2))
    # a state of the same structure says how to read what is there
    found = None if store is None else store.read((state, reports))
    if found is None:
        return Position(), state, reports
    done, (state, reports) = found
    return done, state, reports


def _steps_reported(rows: Sequence[Any], trainer: Trainer) -> tuple[int, int]:
    """Whole epochs, and steps of the next one, that the rows cover."""
    # epoch is a whole number of steps up to rounding
    return divmod(round(rows[-1].epoch * trainer.steps) if rows else 0, trainer.steps)


def _call_end(trainer: Trainer, config: ml_collections.ConfigDict, begin: int) -> int:
    """Where the call that begins at a step of an epoch ends: no call goes beyond a row."""
    every = config.get("report_every") or trainer.steps
    return min(begin + trainer.steps_per_call, (begin // every + 1) * every, trainer.steps)


def _reports(trainer: Trainer, config: ml_collections.ConfigDict, step: int) -> bool:
    """Whether there is a row after so many steps of an epoch."""
    return step == trainer.steps or step % (config.get("report_every") or trainer.steps) == 0


def _over(config: ml_collections.ConfigDict, rows: Sequence[Any], row: Any) -> bool:
    """Whether a run ends with this row."""
    spent, budget = (
        sum(one.seconds for one in (*rows, row)),
        config.get("budget_seconds") or math.inf,
    )
    # a loss that is not finite cannot get better
    return not math.isfinite(row.train_loss) or row.epoch >= config.epochs or spent >= budget


def _evaluated(
    trainer: Trainer,
    config: ml_collections.ConfigDict,
    rows: Sequence[Any],
    row: Any,
    state: State,
    dataset: data.Dataset,
    over: bool,
) -> Any:
    """The row with its test columns: those of the row before where it is not its turn to evaluate."""
    every = config.get("evaluate_every") or math.inf
    # a last row, and the last one of every epoch, is always evaluated
    if over or row.epoch == round(row.epoch) or len(rows) % every == 0:
        test = map(float, trainer.evaluate(state.params, state.model_state, dataset))
    else:
        test = rows[-1][3:5]
    return type(row)(*row[:3], *test, row.seconds)


def _keep(store: Store | None, position: Position, state: State, reports: jax.Array) -> None:
    # after a row, or between rows: the position tells
    if store is not None and store.due(position):
        store.write(position, (state, reports))
