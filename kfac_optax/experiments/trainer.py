"""What all runs of one optimizer share: steps and evaluation, compiled once."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from kfac_optax._tree import tree_bytes
from kfac_optax.experiments import batch_statistics, data, settings, steps
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
        state_bytes: of the optimizer's state.
        parameter_bytes: of the parameters.
    """

    init: Callable[..., State]
    shuffle: Callable[..., steps.Epoch]
    train: Callable[..., tuple[State, jax.Array]]
    evaluate: Callable[..., np.ndarray]
    metrics: type[Metrics | ErrorMetrics]
    steps: int
    steps_per_call: int
    compile_seconds: float
    state_bytes: int
    parameter_bytes: int


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
    sizes = tree_bytes(state.opt_state), tree_bytes(state.params)
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
    return Trainer(
        init, shuffle, train, evaluate, metrics, problem.steps, per_call, seconds, *sizes
    )


def _in_compiled_loop(
    problem: steps.Problem, arguments: tuple[Any, ...]
) -> Callable[..., tuple[State, jax.Array]]:
    # State and reports in place: the state of a preconditioner can be far larger than the model.
    train = jax.jit(functools.partial(steps.train_many, problem), donate_argnums=(1, 2))
    # from 0 to 0: bounds are arrays, so any part of an epoch will do
    return train.lower(*arguments, 0, 0).compile()


def _in_python(
    problem: steps.Problem, arguments: tuple[Any, ...], *, count: int
) -> Callable[..., tuple[State, jax.Array]]:
    # XLA computes convolutions inside a compiled loop or branch several times as slowly on a CPU
    # (jax-ml/jax#12868): one step a call, and what is due is decided on the host.
    schedule = problem.method.due

    def due(step: int) -> dict[str, Any]:
        return {} if schedule is None else schedule(step)

    def compiled(**due: Any) -> Callable[..., tuple[State, jax.Array]]:
        step = functools.partial(steps.train_one, problem, **due)
        return jax.jit(step, donate_argnums=(1, 2)).lower(*arguments, 0).compile()

    # every kind of step that the run will ask for
    steps_apart = range(1 if schedule is None else count)
    kinds = {tuple(due(step).items()) for step in steps_apart}
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
