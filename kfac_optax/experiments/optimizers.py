"""One of the compared optimizers tied to a model: its layers, its options, what updates need."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from flax import linen as nn

import kfac_optax as ko
from kfac_optax.experiments import data, models, schedules
from kfac_optax.experiments.catalogue_optimizers import (
    Curved,
    Optimizer,
    Rate,
    drawn_labels,
    own_losses,
)
from kfac_optax.experiments.compared import OPTIMIZERS
from kfac_optax.experiments.likelihoods import Likelihood

__all__ = ["OPTIMIZERS", "Curved", "Method", "make"]


# What `config.kfac` says of the model rather than of the method holds for the adaptive ones too.
_STRUCTURE = (
    "uncovered",
    "normalization",
    "sharing",
    "positions",
    "convolution",
    "recurrence",
    "factor_dtype",
    "precision",
)


class Method(NamedTuple):
    """An optimizer tied to a model.

    Attributes:
        transform: learning rate to the Optax transformation.
        extra: `(params, model_state, x, key, *, value, value_fn, grad, targets, measure=None,
          refresh=None, **due)` to the extra arguments of its update: loss and gradient of the
          mini-batch, the loss as a function of the parameters, and the targets; with `measure=` and
          `refresh=` (and whatever else `due` names) what is due is decided when the step is
          compiled.
        due: step to what is due in it, as these keyword arguments; None where nothing ever is.
        value_and_grad: `(params, model_state, x, *, targets, key)` to
          `((loss, (logits, model_state)), gradient, curvature)`, of an optimizer that preconditions
          gradients from their rows; the extra arguments of its update are then this curvature and
          what is due.
        drawn: `(params, optimizer state, key)` to the parameters at which loss, gradient and
          curvature are taken, of an optimizer that follows a posterior.
    """

    transform: Callable[[Rate], Any]
    extra: Callable[..., dict[str, Any]]
    due: Callable[[int], dict[str, Any]] | None = None
    value_and_grad: Callable[..., Any] | None = None
    drawn: Callable[..., Any] | None = None


def make(
    config: ml_collections.ConfigDict,
    name: str,
    *,
    model: nn.Module,
    likelihood: Likelihood,
    x: jax.Array,
    steps: int,
) -> Method:
    """Ties the optimizer `name` to a model, whose layers are found by tracing it on `x`.

    Args:
        config: the experiment.
        name: a key of `OPTIMIZERS`.
        model: from `models.build`.
        likelihood: what the logits of the model parametrise.
        x: a batch of inputs as the model gets them; only its shape matters.
        steps: mini-batches of an epoch, for what changes with the epoch.

    Returns:
        The transformation and what its update needs besides the gradient.

    Raises:
        ValueError: the name is unknown.
    """
    optimizer = data.select(OPTIMIZERS, name, "config.optimizers")
    # what a schedule multiplies the rate with
    factor = schedules.rate_factor(config.get("schedule"), steps=steps, epochs=config.epochs)

    def scheduled(rate: Rate) -> Rate:
        # Without a schedule the rate stays a number: the optimizers then keep no count of their
        # own.
        return rate if factor is None else lambda step: rate * factor(step)

    # gradients alone, or with the loss as a function: no layers and no curvature
    if not optimizer.curvature:
        words, drawn = _posterior(config, optimizer, None, examples=steps * len(x))
        words |= _of_section(config, optimizer)
        bare = Curved(None, words) if words else None
        return Method(
            lambda rate: optax.with_extra_args_support(
                optimizer.build(config, bare, scheduled(rate))
            ),
            lambda *_, value_fn=None, **__: {"value_fn": value_fn} if optimizer.value_fn else {},
            drawn=drawn,
        )

    predict, losses = _measured(model, likelihood)
    subsample = config.get("subsample") or None
    estimator = optimizer.estimator(predict, losses, subsample)
    # that of losses would need targets to find the same layers
    of_model = drawn_labels(predict, losses, subsample)
    finds_layers = of_model if optimizer.estimator is own_losses else estimator
    # shapes alone are needed to find layers
    start = functools.partial(models.init, model, x=x)
    params, model_state = jax.eval_shape(start, jax.random.key(0))
    layers = finds_layers.layers(params, model_state, x)
    curved = Curved(layers, _options(config, optimizer, steps))
    words, drawn = _posterior(config, optimizer, layers, examples=steps * len(x))
    curved.options.update(words)
    if optimizer.sampled:
        # the gradient that it is given is a mean over the batch
        curved.options["examples"] = len(x)
    in_one_pass = None
    if curved.options.get("factored_gradient") and optimizer.estimator is drawn_labels:
        # one pass for loss, gradient and curvature: rows of the gradient are those of the curvature
        in_one_pass = estimator.value_and_grad(
            lambda prediction, targets: prediction.mean_nll(targets)
        )
    return Method(
        lambda rate: optimizer.build(config, curved, scheduled(rate)),
        _extra(config, optimizer, estimator),
        None if optimizer.every_step else _due(optimizer, curved),
        in_one_pass,
        drawn,
    )


def _measured(
    model: nn.Module, likelihood: Likelihood
) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """What estimators measure: the prediction of a model, and the losses `[N]` of the data."""

    def predict(params: Any, model_state: Any, x: jax.Array) -> Any:
        # In train mode, as the gradient sees the model.
        logits, model_state = models.apply(model, params, model_state, x, train=True)
        return likelihood.distribution(logits), (logits, model_state)

    def losses(params: Any, model_state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits, _ = models.apply(model, params, model_state, x, train=True)
        of_terms = likelihood.nll(logits, y)
        # [N, ...] to one loss for each example
        return of_terms.reshape(len(of_terms), -1).mean(1)

    return predict, losses


def _options(config: ml_collections.ConfigDict, optimizer: Optimizer, steps: int) -> dict[str, Any]:
    # options of the configuration, for presets that take them
    options = config.kfac.to_dict()
    options |= _of_section(config, optimizer)
    if not optimizer.adaptive:
        return schedules.resolve(options, steps=steps, where="config.kfac")
    # damping and periods are their own affair
    own = config.adaptive.to_dict() if "adaptive" in config else {}
    return {k: options[k] for k in _STRUCTURE if k in options} | schedules.resolve(
        own, steps=steps, where="config.adaptive"
    )


def _of_section(config: ml_collections.ConfigDict, optimizer: Optimizer) -> dict[str, Any]:
    """Options for methods of its kind; what a posterior is like is no matter of the preset alone."""
    known = optimizer.section in config and optimizer.drawn is None
    return config[optimizer.section].to_dict() if known else {}


def _extra(
    config: ml_collections.ConfigDict, optimizer: Optimizer, estimator: ko.Estimator
) -> Callable[..., dict[str, Any]]:
    """Curvature where it is due or where every update needs it, and the loss of the batch."""
    of_losses = optimizer.estimator is own_losses
    # what finds its damping itself looks at the objective, weight decay included
    decay = config.weight_decay if optimizer.adaptive else 0.0

    def objective(value: Any, params: Any) -> Any:
        # f(theta) + (decay / 2) |theta|^2
        return value + decay / 2 * optax.tree.norm(params, squared=True) if decay else value

    def extra(
        params: Any,
        model_state: Any,
        x: jax.Array,
        key: jax.Array,
        *,
        value: Any = None,
        value_fn: Any = None,
        grad: Any = None,
        targets: Any = None,
        measure: Any = None,
        refresh: Any = None,
        **due: Any,
    ):
        del grad  # the transformation gets it with the weight decay
        # what takes products needs curvature in every update, statistics or not
        always = optimizer.adaptive or optimizer.products or optimizer.every_step
        curvature = None
        if always or measure in (None, True):
            batch = (x, targets) if of_losses else (x,)
            curvature = estimator.at(params, model_state, *batch, key=key)
        # the host's schedule says what is due
        given = {"curvature": curvature, "refresh": refresh, **due}
        if optimizer.adaptive or optimizer.products:
            given["measure"] = measure
        if optimizer.adaptive:
            given["value_fn"] = lambda params: objective(value_fn(params), params)
        if optimizer.sampled and curvature is not None:
            given["sampled_grads"] = curvature.sampled_gradient()
        if optimizer.value_fn:
            given["value_fn"] = value_fn
        if optimizer.value or optimizer.adaptive:
            given["value"] = objective(value, params)
        return given

    return extra


def _posterior(
    config: ml_collections.ConfigDict, optimizer: Optimizer, layers: Any, *, examples: int
) -> tuple[dict[str, float], Callable[[Any, Any, jax.Array], Any] | None]:
    """The weight decay that an optimizer has to know to follow a posterior, and its draws."""
    draw = optimizer.drawn
    if draw is None:
        return {}, None
    t, variance = _temperature_and_variance(config)
    # the prior N(0, variance I) has a weight decay of t / (N variance)
    words = {"weight_decay": config.weight_decay or t / (examples * variance)}

    def drawn(params: Any, opt_state: Any, key: jax.Array) -> Any:
        return draw(layers, opt_state, params, key, size=examples, temperature=t, **words)

    return words, drawn


def _temperature_and_variance(config: ml_collections.ConfigDict) -> tuple[float, float]:
    """Of the section `posterior`, one each where it says nothing."""
    said = {"temperature": 1.0, "variance": 1.0}
    given = config.posterior.to_dict() if "posterior" in config else {}
    for name, value in given.items():
        if name not in said or not value > 0:
            raise ValueError(
                f"config.posterior.{name}: got {value!r}, expected a positive temperature or "
                "variance (of the prior), and nothing else."
            )
    if config.weight_decay and "variance" in given:
        raise ValueError(
            f"config.posterior.variance: got {given['variance']!r} beside config.weight_decay="
            f"{config.weight_decay!r}, expected one of them: both say how wide the prior is."
        )
    said |= given
    return said["temperature"], said["variance"]


def _due(optimizer: Optimizer, curved: Curved) -> ko.HostSchedule:
    # what the presets do by default, where the configuration says nothing
    options = dict(curved.options)
    if optimizer.adaptive:
        defaults = inspect.signature(ko.kfac_adaptive).parameters
        names = ("curvature_every", "inverse_every", "adapt_every")
        options = {name: defaults[name].default for name in names} | options
    periods = {
        k: options[k]
        for k in ("curvature_every", "inverse_every", "stagger", "adapt_every")
        if k in options
    }
    return ko.HostSchedule(**periods)
