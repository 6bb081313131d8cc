"""Training loop: an epoch is one or more calls of a function that is compiled once per optimizer."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from kfac_optax.experiments import batch_statistics, data, settings, steps
from kfac_optax.experiments.checkpoints import Position, Store
from kfac_optax.experiments.steps import State


class Metrics(NamedTuple):
    """One row of `metrics.csv`.

    A loss is a mean over examples and over the targets of an example. The training columns are
    means over the mini-batches since the row before, and `seconds` is the time spent on these.
    `epoch` counts the epochs trained so far, in parts of one where `config.report_every` asks for
    rows within it.
    """

    epoch: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


class ErrorMetrics(NamedTuple):
    """The row of a likelihood that is scored by an error."""

    epoch: float
    train_loss: float
    train_error: float
    test_loss: float
    test_error: float
    seconds: float


class Trainer(NamedTuple):
    """The functions of one optimizer that every run of it shares.

    Attributes:
        init: (rate, key, dataset) to the first state.
        shuffle: key to the mini-batches of an epoch.
        train: (rate, state, reports, dataset, epoch, begin, end) to state and reports after the
          mini-batches from `begin` up to `end`; takes the memory of the first of both over.
        evaluate: (params, model_state, dataset) to test loss and score.
        metrics: the kind of a row.
        steps: mini-batches of one epoch.
        steps_per_call: at most so many of them in one call of `train`.
        compile_seconds: time that compiling `train` took.
    """

    init: Callable[..., State]
    shuffle: Callable[..., steps.Epoch]
    train: Callable[..., tuple[State, jax.Array]]
    evaluate: Callable[..., np.ndarray]
    metrics: type[Metrics | ErrorMetrics]
    steps: int
    steps_per_call: int
    compile_seconds: float


def prepare(config: ml_collections.ConfigDict, name: str) -> Trainer:
    """Compiles the training of one optimizer; learning rate and seed stay arguments.

    Args:
        config: the experiment.
        name: a key of `optimizers.OPTIMIZERS`.

    Returns:
        The functions that `run` needs.

    Raises:
        ValueError: a name is unknown, a batch is larger than the training set, or a label too large
          for the model.
    """
    # what the configuration says of this optimizer alone goes first
    config = settings.of(config, name)
    dataset, key = start(config, seed=0)
    # shapes are those of every seed
    problem = steps.problem(config, name, dataset)
    examples, tests = len(dataset.train_x), len(dataset.test_x)

    # an array: one compiled program serves all rates
    rate = jnp.float32(config.learning_rate)
    init = jax.jit(functools.partial(steps.init, problem))
    shuffle = jax.jit(lambda key: steps.shuffle(problem, key, examples))
    state, reports = init(rate, key, dataset), steps.no_reports(problem)
    arguments = rate, state, reports, dataset, shuffle(state.key)
    began = time.perf_counter()
    if config.get("python_loop"):
        train = _in_python(problem, arguments, count=config.epochs * problem.steps)
    else:
        train = _in_compiled_loop(problem, arguments)
    seconds = time.perf_counter() - began
    # The first call allocates; the epochs of a run are timed without that.
    jax.block_until_ready(train(*arguments, 0, 1))

    # all test examples at once, or in batches
    evaluate = _evaluation(problem, min(config.get("evaluation_batch") or tests, tests))
    choice = config.get("evaluate_with") or "fresh"
    batch_statistics.check(choice)
    if choice == "fresh" and batch_statistics.COLLECTION in state.model_state:
        evaluate = _with_fresh_statistics(problem, evaluate)
    # an epoch is one call, or as many as keep a single one short
    per_call = min(config.get("steps_per_call") or problem.steps, problem.steps)
    metrics = ErrorMetrics if problem.likelihood.error else Metrics
    return Trainer(init, shuffle, train, evaluate, metrics, problem.steps, per_call, seconds)


def _in_compiled_loop(
    problem: steps.Problem, arguments: tuple[Any, ...]
) -> Callable[..., tuple[State, jax.Array]]:
    # State and reports in place: the state of a preconditioner can be far larger than the model.
    # from 0 to 0: bounds are arrays, so any part of an epoch will do
    train = jax.jit(functools.partial(steps.train_many, problem), donate_argnums=(1, 2))
    return train.lower(*arguments, 0, 0).compile()


def _in_python(
    problem: steps.Problem, arguments: tuple[Any, ...], *, count: int
) -> Callable[..., tuple[State, jax.Array]]:
    # XLA computes convolutions inside a compiled loop or branch several times as slowly on a CPU
    # periods on the host, known before a step runs
    # (jax-ml/jax#12868): one step a call, and what is due is decided here.
    schedule = problem.method.due

    def due(step: int) -> dict[str, Any]:
        return {} if schedule is None else schedule(step)

    def compiled(**due: Any) -> Callable[..., tuple[State, jax.Array]]:
        step = functools.partial(steps.train_one, problem, **due)
        return jax.jit(step, donate_argnums=(1, 2)).lower(*arguments, 0).compile()

    # every kind of step that the run will ask for
    kinds = {tuple(due(step).items()) for step in range(1 if schedule is None else count)}
    made = {kind: compiled(**dict(kind)) for kind in kinds}

    def train(
        rate: Any, state: Any, reports: Any, dataset: Any, epoch: Any, begin: int, end: int
    ) -> Any:
        # a restored run goes on in the middle of its periods
        first = 0 if schedule is None else int(optax.tree.get(state.opt_state, "kfac_count"))
        for i in range(begin, end):
            state, reports = made[tuple(due(first + i - begin).items())](
                rate, state, reports, dataset, epoch, i
            )
        return state, reports

    return train


def _evaluation(problem: steps.Problem, size: int) -> Callable[..., np.ndarray]:
    report = jax.jit(functools.partial(steps.evaluate, problem), static_argnames="size")

    # weighted by the number of examples, as a last batch is smaller
    def evaluate(params: Any, model_state: Any, dataset: data.Dataset) -> np.ndarray:
        examples = len(dataset.test_x)
        if size == examples:
            return np.asarray(report(params, model_state, dataset, 0, size=size))
        total = np.zeros(2)
        for begin in range(0, examples, size):
            # a last batch of another size is compiled once more
            count = min(size, examples - begin)
            total += count * np.asarray(
                report(params, model_state, dataset, begin, size=count), float
            )
        return total / examples

    return evaluate


_STATISTICS_BATCHES = 4  # the first ones of the training set, the same in every evaluation


def _with_fresh_statistics(
    problem: steps.Problem, evaluate: Callable[..., np.ndarray]
) -> Callable[..., np.ndarray]:
    """An evaluation whose batch statistics are those of training batches under the weights at hand."""
    after = jax.jit(functools.partial(steps.statistics_after, problem))
    name, size = batch_statistics.COLLECTION, problem.batch_size

    def fresh(params: Any, model_state: Any, dataset: data.Dataset) -> np.ndarray:
        count = min(_STATISTICS_BATCHES, problem.steps)
        batches = [dataset.train_x[i * size : (i + 1) * size] for i in range(count)]
        runs = [functools.partial(after, params, model_state, x) for x in batches]
        old = model_state[name]
        # how fast the running averages move, seen from one batch
        m = batch_statistics.momentum(runs[0], old)
        found = batch_statistics.mean_over(runs, old, m)
        return evaluate(params, {**model_state, name: found}, dataset)

    return fresh


def start(config: ml_collections.ConfigDict, *, seed: int) -> tuple[data.Dataset, jax.Array]:
    """Data set and random key of one seed: the same for every optimizer and learning rate."""
    # data and training draw from keys of their own
    data_key, key = jax.random.split(jax.random.key(seed))
    return data.load(config.data, data_key), key


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
