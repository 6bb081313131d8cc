"""Physics-informed networks: loss, likelihoods, optimizers and the training of one run."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import kfac_optax as ko
from kfac_optax.experiments import equations, jets
from kfac_optax.experiments.equations import Equation

Build = Callable[[ml_collections.ConfigDict, Any, Any], optax.GradientTransformation]


class Method(NamedTuple):
    """An optimizer.

    Attributes:
      label: what it is called.
      tuned: whether it has a rate to choose.
      build: `(config, layers, rate)` to the transformation, whose updates get `value`, `grad` and
        `value_fn`.
      curvature: whether they get `curvature` too.
      coupled: it sees examples across layers, so both equations need as many points.
    """

    label: str
    tuned: bool
    build: Build
    curvature: bool = True
    coupled: bool = False


class Batch(NamedTuple):
    """Points of both equations, which stay the same."""

    edge: jax.Array
    inside: jax.Array


class History(NamedTuple):
    """A finished run, `[points + 1]` each, the start included."""

    steps: np.ndarray
    seconds: np.ndarray  # of training, without compilation and evaluation
    loss: np.ndarray
    error: np.ndarray


def _kfac(preset: Callable[..., Any], **fixed: Any) -> Build:
    def build(config: ml_collections.ConfigDict, layers: Any, rate: Any) -> Any:
        options = config.kfac.to_dict() | _made(fixed)
        natural = preset(layers, learning_rate=rate, **options)
        return optax.chain(natural, optax.sgd(rate, options["momentum"]))

    return build


def _adaptive(preset: Callable[..., Any], **fixed: Any) -> Build:
    def build(config: ml_collections.ConfigDict, layers: Any, rate: Any) -> Any:
        return preset(layers, **(config.adaptive.to_dict() | _made(fixed)))

    return build


# a block is made with its optimizer, not when this module is read
def _made(fixed: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in fixed.items()}


def _adam(config: ml_collections.ConfigDict, layers: Any, rate: Any) -> Any:
    schedule = lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * count / config.steps["adam"]))
    return optax.adam(schedule)


def _lbfgs(config: ml_collections.ConfigDict, layers: Any, rate: Any) -> Any:
    return optax.lbfgs(memory_size=config.lbfgs_memory)


def _natural(config: ml_collections.ConfigDict, layers: Any, rate: Any) -> Any:
    # the kernel of rows needs as many examples in both equations, products with J do not
    paired = config.inside_points == config.boundary_points
    natural = ko.smw(layers if paired else None)
    step = optax.chain(natural, ko.quadratic_step())
    return ko.adapt_damping(step, **config.adaptive.to_dict())


METHODS = {
    "adam": Method("Adam", True, _adam, curvature=False),
    "lbfgs": Method("L-BFGS", False, _lbfgs, curvature=False),
    "kfac": Method("K-FAC", False, _kfac(ko.kfac)),
    "kfac_equations": Method("K-FAC per equation", False, _kfac(ko.kfac, block=ko.per_equation)),
    "two_level": Method("two-level", False, _kfac(ko.kfac_two_level), coupled=True),
    "kfac_adaptive": Method("K-FAC, adaptive", False, _adaptive(ko.kfac_adaptive)),
    "kfac_equations_adaptive": Method(
        "K-FAC per equation, adaptive",
        False,
        _adaptive(ko.kfac_adaptive, block=ko.per_equation),
    ),
    "two_level_adaptive": Method(
        "two-level, adaptive", False, _adaptive(ko.kfac_two_level_adaptive), coupled=True
    ),
    "natural_adaptive": Method("natural gradient, adaptive", False, _natural),
}


def equation_of(config: ml_collections.ConfigDict) -> Equation:
    """The equation of an experiment."""
    return equations.EQUATIONS[config.equation](config.dimensions)


def dtype_of(config: ml_collections.ConfigDict) -> jnp.dtype:
    """Of parameters and points."""
    return jnp.dtype("float64" if config.float64 else "float32")


def draw(config: ml_collections.ConfigDict, key: jax.Array) -> Batch:
    """The points of a run."""
    edge_key, inside_key = jax.random.split(key)
    equation, dtype = equation_of(config), dtype_of(config)
    return Batch(
        equations.boundary(edge_key, config.boundary_points, equation, dtype),
        equations.inside(inside_key, config.inside_points, equation, dtype),
    )


def residuals(equation: Equation, params: jets.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What is to vanish: `u - u*` on the boundary and the residual inside."""
    edge = jets.network(params, batch.edge) - equation.solution(batch.edge)
    jet = jets.network_jet(params, batch.inside, equation.times)
    return edge, equation.residual(jet, batch.inside)


def predictor(equation: Equation) -> Callable[[jets.Params, Batch], dict[str, ko.Normal]]:
    """Two heads, each a mean over its own points: the Gauss-Newton matrix of the loss is theirs."""

    def predict(params: jets.Params, batch: Batch) -> dict[str, ko.Normal]:
        edge, residual = residuals(equation, params, batch)
        return {"boundary": ko.Normal(edge), "inside": ko.Normal(residual)}

    return predict


def loss_of(equation: Equation, params: jets.Params, batch: Batch) -> jax.Array:
    """Half the mean squares of both residuals, added up.

    Not the negative log-likelihood, whose constant would drown what is left in the end.
    """
    edge, inside = residuals(equation, params, batch)
    return 0.5 * jnp.mean(jnp.square(edge)) + 0.5 * jnp.mean(jnp.square(inside))


def error_of(equation: Equation, params: jets.Params, x: jax.Array) -> jax.Array:
    """`||u - u*|| / ||u*||` over points `[N, d]`."""
    exact = equation.solution(x)
    return jnp.linalg.norm(jets.network(params, x) - exact) / jnp.linalg.norm(exact)


class Trainer(NamedTuple):
    """Compiled functions of one optimizer, for all rates and seeds."""

    start: Callable[..., Any]  # (key, rate) -> carry
    advance: Callable[..., Any]  # (carry, rate, batch) -> carry, after `report_every` steps
    evaluate: Callable[..., Any]  # (carry, batch, test points) -> loss, error


def prepare(config: ml_collections.ConfigDict, name: str) -> Trainer:
    """Makes the functions of an optimizer; they are compiled at their first call."""
    equation, dtype = equation_of(config), dtype_of(config)
    method, estimator = METHODS[name], ko.ggn(predictor(equation))
    sizes = (equation.dimensions, *config.widths, 1)

    def abstract() -> tuple[Any, Batch]:
        return jets.init(jax.random.key(0), sizes, dtype), draw(config, jax.random.key(0))

    layers = estimator.layers(*jax.eval_shape(abstract))  # nothing is computed

    def make(rate: Any) -> Any:
        return optax.with_extra_args_support(method.build(config, layers, rate))

    def start(key: jax.Array, rate: jax.Array) -> Any:
        params = jets.init(key, sizes, dtype)
        return params, make(rate).init(params)

    def step(carry: Any, rate: jax.Array, batch: Batch) -> Any:
        params, state = carry
        value_fn = lambda params: loss_of(equation, params, batch)
        value, grad = jax.value_and_grad(value_fn)(params)  # full batch, nothing drawn
        extra = {"value": value, "grad": grad, "value_fn": value_fn}
        extra |= {"curvature": estimator.at(params, batch)} if method.curvature else {}
        updates, state = make(rate).update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def advance(carry: Any, rate: jax.Array, batch: Batch) -> Any:
        def body(carry: Any, _: None) -> tuple[Any, None]:
            return step(carry, rate, batch), None

        return jax.lax.scan(body, carry, length=config.report_every)[0]

    def evaluate(carry: Any, batch: Batch, test: jax.Array) -> tuple[jax.Array, jax.Array]:
        params, _ = carry
        return loss_of(equation, params, batch), error_of(equation, params, test)

    return Trainer(jax.jit(start), jax.jit(advance), jax.jit(evaluate))


def train(
    config: ml_collections.ConfigDict,
    name: str,
    trainer: Trainer,
    rate: float,
    seed: int,
    tick: Callable[[int], None] = lambda steps: None,
) -> History:
    """One run.

    Args:
      config: the experiment.
      name: of the optimizer.
      trainer: its functions.
      rate: learning rate.
      seed: of weights and points.
      tick: called with the steps just done.

    Returns:
      Its `History`.
    """
    key, batch_key = jax.random.split(jax.random.key(config.first_seed + seed))
    test = equations.inside(
        jax.random.key(7), config.test_points, equation_of(config), dtype_of(config)
    )
    batch, eta = draw(config, batch_key), jnp.asarray(rate, dtype_of(config))
    carry = trainer.start(key, eta)  # parameters and state of the optimizer
    # compiled, twice where the types of a state are settled by its first update, and thrown away
    warm = trainer.advance(trainer.advance(carry, eta, batch), eta, batch)
    jax.block_until_ready(warm)
    rows, seconds = [trainer.evaluate(carry, batch, test)], [0.0]
    for _ in range(config.steps[name] // config.report_every):
        began = time.perf_counter()
        carry = jax.block_until_ready(trainer.advance(carry, eta, batch))
        seconds.append(seconds[-1] + time.perf_counter() - began)
        rows.append(trainer.evaluate(carry, batch, test))
        tick(config.report_every)
    loss, error = np.asarray(rows, float).T
    steps = config.report_every * np.arange(len(rows))
    return History(steps, np.asarray(seconds), loss, error)


def fastest(group: Sequence[History]) -> float:
    """Milliseconds of a step in the fastest stretch between two rows of any run.

    >>> run = History(np.array([0, 10, 20]), np.array([0.0, 0.5, 0.7]), np.ones(3), np.ones(3))
    >>> print(round(fastest([run]), 3))
    20.0
    """
    return 1e3 * min(np.min(np.diff(run.seconds) / np.diff(run.steps)) for run in group)
