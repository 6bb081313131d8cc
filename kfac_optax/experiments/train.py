"""Training loop: one compiled call per epoch, one compilation per optimizer."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from kfac_optax.experiments import data, models, optimizers


class State(NamedTuple):
    """All that an epoch changes; `model_state` is `{}` for models without batch statistics."""

    params: Any
    model_state: Any
    opt_state: Any
    key: jax.Array


class Metrics(NamedTuple):
    """One row of `metrics.csv`.

    A loss is a mean over examples and over the targets of an example. The training columns are
    means over the mini-batches of the epoch, and `seconds` is the time spent on these.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


class Trainer(NamedTuple):
    """The functions of one optimizer that every run of it shares.

    Attributes:
        init: (rate, key, dataset) to the first state.
        epoch: compiled (rate, state, dataset) to the next state, training loss and accuracy.
        evaluate: compiled (state, dataset) to test loss and accuracy.
        steps: mini-batches of one epoch.
        compile_seconds: time that compiling `epoch` took.
    """

    init: Callable[..., State]
    epoch: Callable[..., tuple[State, jax.Array]]
    evaluate: Callable[..., jax.Array]
    steps: int
    compile_seconds: float


class _Problem(NamedTuple):
    model: Any
    likelihood: models.Likelihood
    method: optimizers.Method
    batch_size: int


def prepare(config: ml_collections.ConfigDict, name: str) -> Trainer:
    """Compiles the epoch of one optimizer; learning rate and seed stay arguments.

    Args:
        config: the experiment.
        name: a key of `optimizers.OPTIMIZERS`.

    Returns:
        The functions that `run` needs.

    Raises:
        ValueError: a name is unknown, or a batch is larger than the training set.
    """
    likelihood = data.select(models.LIKELIHOODS, config.likelihood, "config.likelihood")
    dataset, key = start(config, seed=0)
    examples = len(dataset.train_x)
    if config.batch_size > examples:
        raise ValueError(
            f"config.batch_size: got {config.batch_size}, expected at most the {examples} training examples"
        )
    model = models.build(config.model, outputs=likelihood.outputs(dataset.train_y))
    x = dataset.train_x[: config.batch_size]
    method = optimizers.make(config, name, model=model, likelihood=likelihood, x=x)
    problem = _Problem(model, likelihood, method, config.batch_size)

    rate = jnp.float32(config.learning_rate)
    init = jax.jit(lambda rate, key, dataset: _init(problem, rate, key, dataset))
    state = init(rate, key, dataset)
    evaluate = jax.jit(lambda state, dataset: _evaluate(problem, state, dataset))
    evaluate = evaluate.lower(state, dataset).compile()
    began = time.perf_counter()
    epoch = jax.jit(lambda rate, state, dataset: _epoch(problem, rate, state, dataset))
    epoch = epoch.lower(rate, state, dataset).compile()
    seconds = time.perf_counter() - began
    # The first call allocates; the epochs of a run are timed without that.
    jax.block_until_ready(epoch(rate, state, dataset))
    return Trainer(init, epoch, evaluate, examples // config.batch_size, seconds)


def start(config: ml_collections.ConfigDict, *, seed: int) -> tuple[data.Dataset, jax.Array]:
    """Data set and random key of one seed: the same for every optimizer and learning rate."""
    data_key, key = jax.random.split(jax.random.key(seed))
    return data.load(config.data, data_key), key


def run(trainer: Trainer, config: ml_collections.ConfigDict, *, rate: float, seed: int) -> Iterator[Metrics]:
    """Trains from scratch and yields the metrics of each epoch; stops at a non-finite loss."""
    dataset, key = start(config, seed=seed)
    rate = jnp.float32(rate)
    state = trainer.init(rate, key, dataset)
    jax.block_until_ready((state, dataset))
    for epoch in range(1, config.epochs + 1):
        began = time.perf_counter()
        state, training = jax.block_until_ready(trainer.epoch(rate, state, dataset))
        seconds = time.perf_counter() - began
        test = trainer.evaluate(state, dataset)
        train_loss, train_accuracy, test_loss, test_accuracy = map(float, (*training, *test))
        metrics = Metrics(epoch, train_loss, train_accuracy, test_loss, test_accuracy, seconds)
        yield metrics
        if not math.isfinite(metrics.train_loss):
            return


def _init(problem: _Problem, rate: jax.Array, key: jax.Array, dataset: data.Dataset) -> State:
    init_key, key = jax.random.split(key)
    x = dataset.train_x[: problem.batch_size]
    params, model_state = models.init(problem.model, init_key, x)
    return State(params, model_state, problem.method.transform(rate).init(params), key)


def _epoch(problem: _Problem, rate: jax.Array, state: State, dataset: data.Dataset) -> tuple[State, jax.Array]:
    """Trains on all full mini-batches in a new order; returns mean loss and accuracy `[2]`."""
    examples = len(dataset.train_x)
    steps = examples // problem.batch_size
    key, order_key, curvature_key = jax.random.split(state.key, 3)
    order = jax.random.permutation(order_key, examples)[: steps * problem.batch_size]
    batches = order.reshape(steps, problem.batch_size), jax.random.split(curvature_key, steps)

    def step(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        index, key = batch
        x, y = dataset.train_x[index], dataset.train_y[index]
        return _step(problem, rate, state, x, y, key)

    state, metrics = jax.lax.scan(step, state._replace(key=key), batches)
    return state, metrics.mean(0)


def _step(
    problem: _Problem, rate: jax.Array, state: State, x: jax.Array, y: jax.Array, key: jax.Array
) -> tuple[State, jax.Array]:
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, model_state = models.apply(problem.model, params, state.model_state, x, train=True)
        return problem.likelihood.nll(logits, y).mean(), (logits, model_state)

    grads, (logits, model_state) = jax.grad(loss_fn, has_aux=True)(state.params)
    extra = problem.method.extra(state.params, state.model_state, x, key)
    updates, opt_state = problem.method.transform(rate).update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    return State(params, model_state, opt_state, state.key), _report(problem, logits, y)


def _evaluate(problem: _Problem, state: State, dataset: data.Dataset) -> jax.Array:
    logits, _ = models.apply(problem.model, state.params, state.model_state, dataset.test_x, train=False)
    return _report(problem, logits, dataset.test_y)


def _report(problem: _Problem, logits: jax.Array, y: jax.Array) -> jax.Array:
    # Per target, so that losses compare across target dimensions; training uses the sum, the
    # likelihood that the Fisher belongs to.
    loss = problem.likelihood.nll(logits, y).mean() / models.targets_per_example(y)
    return jnp.stack([loss, problem.likelihood.correct(logits, y).mean()])
