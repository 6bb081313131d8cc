"""What is compiled: initial state, shuffling, training steps and the evaluation of one optimizer's
runs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from kfac_optax.experiments import batch_statistics, data, inputs, likelihoods, models, optimizers


class State(NamedTuple):
    """All that training changes; `model_state` is `{}` for models without batch statistics."""

    params: Any
    model_state: Any
    opt_state: Any
    key: jax.Array  # of the epoch: order of the examples and everything random in its steps


class Epoch(NamedTuple):
    """What an epoch draws.

    Attributes:
        batches: examples of each mini-batch, `[steps, batch_size]`.
        keys: one for each step.
        next_key: of the epoch that follows.
    """

    batches: jax.Array
    keys: jax.Array
    next_key: jax.Array


class Problem(NamedTuple):
    """Everything fixed before a run: model, likelihood, optimizer, sizes."""

    model: Any
    likelihood: likelihoods.Likelihood
    method: optimizers.Method
    inputs: dict[str, Any]
    batch_size: int
    steps: int


def problem(config: ml_collections.ConfigDict, name: str, dataset: data.Dataset) -> Problem:
    """Puts the parts of one optimizer's runs together.

    Args:
        config: the experiment, as this optimizer sees it.
        name: a key of `optimizers.OPTIMIZERS`.
        dataset: of any seed; only shapes and the largest label matter.

    Returns:
        What the other functions here need.

    Raises:
        ValueError: a name is unknown, a batch is larger than the training set, or a label too large
          for the model.
    """
    examples = len(dataset.train_x)
    # a mini-batch that is never full would give no step
    if config.batch_size > examples:
        raise ValueError(
            f"config.batch_size: got {config.batch_size}, expected at most the {examples} training "
            "examples"
        )
    likelihood = data.select(likelihoods.LIKELIHOODS, config.likelihood, "config.likelihood")
    options = config.inputs.to_dict() if "inputs" in config else {}
    inputs.check(options)
    # outputs that the targets need, as their likelihood says
    needed = likelihood.outputs(dataset.train_y)
    model = models.build(config.model, outputs=needed)
    if model.outputs < needed:
        raise ValueError(
            f"config.model.outputs: got {model.outputs}, expected at least the {needed} that the "
            "data need"
        )
    # what is left over of an epoch is not used
    steps = examples // config.batch_size
    x, _ = inputs.evaluation(
        options, dataset.train_x[: config.batch_size], dataset.train_y[: config.batch_size]
    )
    # layers are found on one mini-batch
    method = optimizers.make(config, name, model=model, likelihood=likelihood, x=x, steps=steps)
    return Problem(model, likelihood, method, options, config.batch_size, steps)


def init(problem: Problem, rate: jax.Array, key: jax.Array, dataset: data.Dataset) -> State:
    """The state at the start of a run."""
    init_key, key = jax.random.split(key)
    size = problem.batch_size
    # shapes come from the first mini-batch, values from the key
    x, _ = inputs.evaluation(problem.inputs, dataset.train_x[:size], dataset.train_y[:size])
    params, model_state = models.init(problem.model, init_key, x)
    return State(params, model_state, problem.method.transform(rate).init(params), key)


def shuffle(problem: Problem, key: jax.Array, examples: int) -> Epoch:
    """Divides the examples into full mini-batches, in an order that the key decides."""
    next_key, order_key, step_key = jax.random.split(key, 3)
    # every epoch in another order, but of full mini-batches alone
    order = jax.random.permutation(order_key, examples)[: problem.steps * problem.batch_size]
    keys = jax.random.split(step_key, problem.steps)
    return Epoch(order.reshape(problem.steps, problem.batch_size), keys, next_key)


def no_reports(problem: Problem) -> jax.Array:
    """Room for loss and score of every mini-batch of an epoch, `[steps, 2]`."""
    # reports are written in place, so that the host reads them once in a while
    return jnp.zeros((problem.steps, 2))


def mean_report(reports: jax.Array, begin: jax.Array, end: jax.Array) -> jax.Array:
    """Mean loss and score `[2]` of the mini-batches from `begin` up to `end`; the others may hold
    anything.
    """
    # others may hold NaN, which a product with zero would keep
    index = jnp.arange(len(reports))[:, None]
    within = (begin <= index) & (index < end)
    return jnp.where(within, reports, 0).sum(0) / (end - begin)


def train_one(
    problem: Problem,
    rate: jax.Array,
    state: State,
    reports: jax.Array,
    dataset: data.Dataset,
    epoch: Epoch,
    i: jax.Array,
    **due: Any,
) -> tuple[State, jax.Array]:
    """Trains on mini-batch `i` of an epoch and writes loss and score of it to `reports[i]`.

    `due`: from the optimizer's schedule, or nothing: then the step itself decides what is due.
    """
    # keys and order were drawn before the epoch
    key, index = epoch.keys[i], epoch.batches[i]
    x, y = dataset.train_x[index], dataset.train_y[index]
    input_key = key
    # without changes at random the key stays whole, and a run what it was
    if inputs.is_random(problem.inputs):
        key, input_key = jax.random.split(key)
    x, y = inputs.training(problem.inputs, input_key, x, y)
    state, report = _step(problem, rate, state, x, y, key, due)
    return state, reports.at[i].set(report)


def train_many(
    problem: Problem,
    rate: jax.Array,
    state: State,
    reports: jax.Array,
    dataset: data.Dataset,
    epoch: Epoch,
    begin: jax.Array,
    end: jax.Array,
) -> tuple[State, jax.Array]:
    """Trains on the mini-batches from `begin` up to `end`: one compilation serves any part of an
    epoch.
    """

    def step(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        # a loop with traced bounds is compiled once for any part of an epoch
        return train_one(problem, rate, *carry, dataset, epoch, i)

    return jax.lax.fori_loop(begin, end, step, (state, reports))


def _step(
    problem: Problem,
    rate: jax.Array,
    state: State,
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    due: dict[str, Any],
) -> tuple[State, jax.Array]:
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        # in train mode: batch statistics are those of the mini-batch
        logits, model_state = models.apply(problem.model, params, state.model_state, x, train=True)
        return problem.likelihood.nll(logits, y).mean(), (logits, model_state)

    method, params = problem.method, state.params
    # gradients at parameters drawn from the posterior
    if method.drawn is not None:
        key, draw_key = jax.random.split(key)
        params = method.drawn(params, state.opt_state, draw_key)
    # gradient and curvature apart
    if method.value_and_grad is None:
        (value, (logits, model_state)), grad = jax.value_and_grad(loss_fn, has_aux=True)(params)
        extra = method.extra(
            params,
            state.model_state,
            x,
            key,
            value=value,
            # for rules that evaluate the objective elsewhere
            value_fn=lambda params: loss_fn(params)[0],
            grad=grad,
            targets=y,
            **due,
        )
    else:
        # gradient and curvature share a pass
        (_, (logits, model_state)), grad, curvature = method.value_and_grad(
            state.params, state.model_state, x, targets=y, key=key
        )
        extra = {"curvature": curvature, **due}
    # updates are of the mean parameters, not of those drawn
    updates, opt_state = method.transform(rate).update(grad, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    return State(params, model_state, opt_state, state.key), _report(problem, logits, y)


def statistics_after(
    problem: Problem, params: Any, model_state: Any, x: jax.Array, old: Any
) -> Any:
    """Running averages after a training pass over examples `x`, where they were `old` before."""
    x, _ = inputs.evaluation(problem.inputs, x, x)
    name = batch_statistics.COLLECTION
    # one pass in train mode moves the running averages
    _, new = models.apply(problem.model, params, {**model_state, name: old}, x, train=True)
    return new[name]


def evaluate(
    problem: Problem,
    params: Any,
    model_state: Any,
    dataset: data.Dataset,
    begin: jax.Array,
    size: int,
) -> jax.Array:
    """Mean loss and score `[2]` of the `size` test examples that begin at `begin`."""
    x, y = dataset.test_x, dataset.test_y
    if size < len(x):
        # a part of the test set
        x, y = (jax.lax.dynamic_slice_in_dim(a, begin, size) for a in (x, y))
    x, y = inputs.evaluation(problem.inputs, x, y)
    logits, _ = models.apply(problem.model, params, model_state, x, train=False)
    return _report(problem, logits, y)


def _report(problem: Problem, logits: jax.Array, y: jax.Array) -> jax.Array:
    # mean over targets, so that figures of losses compare
    loss = problem.likelihood.nll(logits, y).mean() / problem.likelihood.targets(y)
    return jnp.stack([loss, problem.likelihood.score(logits, y).mean()])
