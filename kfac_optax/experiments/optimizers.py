"""The compared optimizers by name, each a function of the learning rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from flax import linen as nn

import kfac_optax as ko
from kfac_optax.experiments import data, models, schedules
from kfac_optax.experiments.likelihoods import Likelihood

# A float, a traced scalar (one compiled epoch serves every rate) or a schedule made of one.
Rate = Any
Build = Callable[[ml_collections.ConfigDict, "Curved | None", Rate], optax.GradientTransformation]


class Curved(NamedTuple):
    """What a preconditioner is built from.

    Attributes:
        layers: those that the library found in the model.
        options: `config.kfac` with its schedules, keyword arguments of the library.
    """

    layers: Any
    options: dict[str, Any]


class Optimizer(NamedTuple):
    """One row of the comparison.

    Attributes:
        label: name in tables and figures.
        curvature: whether updates need `curvature=`.
        build: config, layers and options if `curvature`, learning rate to the transformation.
        tuned: whether the grid of learning rates is tried; False for one that finds its own rate and runs once per seed.
    """

    label: str
    curvature: bool
    build: Build
    tuned: bool = True


def _sgd(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    del curved
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum),
    )


def _adam(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    del curved
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(rate))


def _kfac(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    assert curved is not None
    return preconditioned(ko.kfac(curved.layers, learning_rate=rate, **curved.options), config, rate)


def _two_level(coarse: str, coarse_damping: str = "identity") -> Build:
    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        assert curved is not None
        tx = ko.kfac_two_level(
            curved.layers, learning_rate=rate, coarse=coarse, coarse_damping=coarse_damping, **curved.options
        )
        return preconditioned(tx, config, rate)

    return build


def preconditioned(tx: Any, config: ml_collections.ConfigDict, rate: Rate) -> Any:
    """Appends weight decay, momentum and the learning rate to a preconditioner."""
    # The decay is added to the preconditioned gradient, as the paper does: before it, the
    # preconditioner would rescale the decay and the KL clip would see it.
    return optax.chain(
        tx,
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum),
    )


OPTIMIZERS = {
    "sgd": Optimizer("SGD", False, _sgd),
    "adam": Optimizer("Adam", False, _adam),
    "kfac": Optimizer("K-FAC", True, _kfac),
    "two_level": Optimizer("two-level K-FAC", True, _two_level("factored")),
    "two_level_exact": Optimizer("two-level, exact", True, _two_level("exact")),
    "two_level_galerkin": Optimizer("two-level, Galerkin", True, _two_level("factored", "galerkin")),
}


class Method(NamedTuple):
    """An optimizer tied to a model.

    Attributes:
        transform: learning rate to the Optax transformation.
        extra: `(params, model_state, x, key, *, value, value_fn, grad, measure=None, refresh=None, **due)` to the extra
            arguments of its update: loss and gradient of the mini-batch, and the loss as a function of the parameters;
            with `measure=` and `refresh=` (and whatever else `due` names) what is due is decided when the step is compiled.
        due: step to what is due in it, as these keyword arguments; None where nothing ever is.
    """

    transform: Callable[[Rate], Any]
    extra: Callable[..., dict[str, Any]]
    due: Callable[[int], dict[str, Any]] | None = None


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
    factor = schedules.rate_factor(config.get("schedule"), steps=steps)

    def scheduled(rate: Rate) -> Rate:
        # Without a schedule the rate stays a number: the optimizers then keep no count of their own.
        return rate if factor is None else lambda step: rate * factor(step)

    if not optimizer.curvature:
        return Method(
            lambda rate: optax.with_extra_args_support(optimizer.build(config, None, scheduled(rate))),
            lambda *_, **__: {},
        )

    def predict(params: Any, model_state: Any, x: jax.Array) -> Any:
        # In train mode, as the gradient sees the model; the new batch statistics are dropped.
        return likelihood.distribution(models.apply(model, params, model_state, x, train=True)[0])

    fisher = ko.fisher(predict)
    params, model_state = jax.eval_shape(lambda key: models.init(model, key, x), jax.random.key(0))
    options = schedules.resolve(config.kfac.to_dict(), steps=steps, where="config.kfac")
    curved = Curved(fisher.layers(params, model_state, x), options)

    def extra(
        params: Any, model_state: Any, x: jax.Array, key: jax.Array, *,
        value: Any = None, value_fn: Any = None, grad: Any = None, measure: Any = None, refresh: Any = None, **due: Any,
    ):  # fmt: skip
        del value, value_fn, grad
        curvature = fisher.at(params, model_state, x, key=key) if measure in (None, True) else None
        return {"curvature": curvature, "refresh": refresh, **due}

    periods = {k: options[k] for k in ("curvature_every", "inverse_every", "stagger") if k in options}
    return Method(lambda rate: optimizer.build(config, curved, scheduled(rate)), extra, ko.HostSchedule(**periods))
