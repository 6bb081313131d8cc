"""The compared optimizers by name, each a function of the learning rate."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from flax import linen as nn

import kfac_optax as ko
from kfac_optax.experiments import data, models, schedules
from kfac_optax.experiments.likelihoods import Likelihood
from kfac_optax.methods.signature import flat_signature

# A float, a traced scalar (one compiled epoch serves every rate) or a schedule made of one.
Rate = Any
Build = Callable[[ml_collections.ConfigDict, "Curved | None", Rate], optax.GradientTransformation]


class Curved(NamedTuple):
    """What a preconditioner is built from.

    Attributes:
        layers: those that the library found in the model.
        options: keyword arguments of the library, from `config.kfac`, with `config.low_rank` where
          that is meant, or from `config.adaptive`; with their schedules.
    """

    layers: Any
    options: dict[str, Any]


class Optimizer(NamedTuple):
    """One row of the comparison.

    Attributes:
        label: name in tables and figures.
        curvature: whether updates need `curvature=`.
        build: config, layers and options if `curvature`, learning rate to the transformation.
        adaptive: whether it finds rate, momentum and damping itself: its updates need the loss, no
          grid is tried, and its options are those of `config.adaptive`.
        low_rank: whether its inverses are of low rank: the options of `config.low_rank` come on top
          of `config.kfac`.
        every_step: whether each update needs the curvature of its own batch, and nothing is ever
          due.
    """

    label: str
    curvature: bool
    build: Build
    adaptive: bool = False
    low_rank: bool = False
    every_step: bool = False

    @property
    def tuned(self) -> bool:
        """Whether the grid of learning rates is tried."""
        return not self.adaptive


def _sgd(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    del curved
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum),
    )


def _adam(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    del curved
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(rate))


def _gradient_only(preset: Callable[..., Any]) -> Build:
    """A preset on the parameter tree alone, with weight decay in the gradient as for Adam."""

    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        del curved
        return optax.chain(optax.add_decayed_weights(config.weight_decay), preset(rate))

    return build


# Words of a configuration that some of its methods decide on themselves: corrections of directions,
# and the inverse where damping is exact.
_OF_SOME = ("correct_every", "correct_share", "inverse")


def _preset(preset: Callable[..., Any]) -> Build:
    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        assert curved is not None
        known = inspect.signature(preset).parameters
        options = {
            word: value
            for word, value in curved.options.items()
            if word in known or word not in _OF_SOME
        }
        return preconditioned(preset(curved.layers, learning_rate=rate, **options), config, rate)

    return build


def _online_two_level(layers: Any, **options: Any) -> Any:
    return ko.b_kfac(layers, coupling=ko.coarse_correction(), **options)


@flat_signature(ko.kpsvd, without=("rank", "inverse"))
def _two_products(layers: Any, **options: Any) -> Any:
    return ko.kpsvd(layers, rank=2, **options)


def _two_level(coarse: str, coarse_damping: str = "identity") -> Build:
    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        assert curved is not None
        tx = ko.kfac_two_level(
            curved.layers,
            learning_rate=rate,
            coarse=coarse,
            coarse_damping=coarse_damping,
            **curved.options,
        )
        return preconditioned(tx, config, rate)

    return build


def _exact(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    """The kernel of the rows of layers: for models whose examples do not interact."""
    assert curved is not None
    options = {word: curved.options[word] for word in ("damping", "kl_clip")}
    return preconditioned(ko.smw(curved.layers, learning_rate=rate, **options), config, rate)


def _bounded(preset: Callable[..., Any], **words: Any) -> Build:
    """A preset whose whole step, momentum included, is bounded in the exact metric."""

    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        assert curved is not None
        options = {
            **curved.options,
            "kl_clip": 1e-3,
            "bound": "exact",
            "momentum": config.momentum,
            **words,
        }
        return preconditioned(preset(curved.layers, learning_rate=rate, **options), config, rate)

    return build


def _adaptive(preset: Callable[..., Any]) -> Build:
    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        del rate
        assert curved is not None
        decay = config.weight_decay  # in the objective, as the ratio of its reduction sees it
        tx = preset(curved.layers, weight_decay=decay, **curved.options)
        return optax.chain(optax.add_decayed_weights(decay), tx)

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
    "muon": Optimizer("Muon", False, _gradient_only(optax.contrib.muon)),
    "shampoo": Optimizer("Shampoo", False, _gradient_only(ko.shampoo)),
    "soap": Optimizer("SOAP", False, _gradient_only(ko.soap)),
    "eva_s": Optimizer("Eva-s", False, _gradient_only(ko.eva_s)),
    "kfac": Optimizer("K-FAC", True, _preset(ko.kfac)),
    "ekfac": Optimizer("EKFAC", True, _preset(ko.ekfac)),
    "thor": Optimizer("THOR", True, _preset(ko.thor)),
    "ingd": Optimizer("INGD", True, _preset(ko.ingd)),
    "singd": Optimizer("SINGD", True, _preset(ko.singd)),
    "skfac": Optimizer("SKFAC", True, _preset(ko.skfac)),
    "hylo": Optimizer("HyLo", True, _preset(ko.hylo)),
    "tkfac": Optimizer("TKFAC", True, _preset(ko.tkfac)),
    "tekfac": Optimizer("TEKFAC", True, _preset(ko.tekfac)),
    "kpsvd": Optimizer("KPSVD", True, _preset(ko.kpsvd)),
    "kpsvd_two": Optimizer("KPSVD, two terms", True, _preset(_two_products)),
    "two_level": Optimizer("two-level K-FAC", True, _two_level("factored")),
    "two_level_exact": Optimizer("two-level, exact", True, _two_level("exact")),
    "two_level_galerkin": Optimizer(
        "two-level, Galerkin", True, _two_level("factored", "galerkin")
    ),
    # The bound of these is the default one in every experiment: it is not tuned.
    "kfac_bounded": Optimizer("K-FAC, bounded", True, _bounded(ko.kfac)),
    "two_level_bounded": Optimizer(
        "two-level, bounded", True, _bounded(ko.kfac_two_level, coarse="exact", balance="model")
    ),
    "kfac_adaptive": Optimizer("K-FAC, adaptive", True, _adaptive(ko.kfac_adaptive), adaptive=True),
    "two_level_adaptive": Optimizer(
        "two-level, adaptive", True, _adaptive(ko.kfac_two_level_adaptive), adaptive=True
    ),
    "smw": Optimizer("natural gradient of the batch", True, _exact, every_step=True),
    "rs_kfac": Optimizer("RS-KFAC", True, _preset(ko.rs_kfac), low_rank=True),
    "b_kfac": Optimizer("B-KFAC", True, _preset(ko.b_kfac), low_rank=True),
    "b_r_kfac": Optimizer("B-R-KFAC", True, _preset(ko.b_r_kfac), low_rank=True),
    "b_kfac_c": Optimizer("B-KFAC-C", True, _preset(ko.b_kfac_c), low_rank=True),
    "b_r_c": Optimizer("B-R-C", True, _preset(ko.b_r_c), low_rank=True),
    "b_kfac_two_level": Optimizer(
        "B-KFAC, two-level", True, _preset(_online_two_level), low_rank=True
    ),
}
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
        extra: `(params, model_state, x, key, *, value, value_fn, grad, measure=None, refresh=None,
          **due)` to the extra arguments of its update: loss and gradient of the mini-batch, and the
          loss as a function of the parameters; with `measure=` and `refresh=` (and whatever else
          `due` names) what is due is decided when the step is compiled.
        due: step to what is due in it, as these keyword arguments; None where nothing ever is.
        value_and_grad: `(params, model_state, x, *, targets, key)` to
          `((loss, (logits, model_state)), gradient, curvature)`, of an optimizer that preconditions
          gradients from their rows; the extra arguments of its update are then this curvature and
          what is due.
    """

    transform: Callable[[Rate], Any]
    extra: Callable[..., dict[str, Any]]
    due: Callable[[int], dict[str, Any]] | None = None
    value_and_grad: Callable[..., Any] | None = None


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
        # Without a schedule the rate stays a number: the optimizers then keep no count of their
        # own.
        return rate if factor is None else lambda step: rate * factor(step)

    if not optimizer.curvature:
        return Method(
            lambda rate: optax.with_extra_args_support(
                optimizer.build(config, None, scheduled(rate))
            ),
            lambda *_, **__: {},
        )

    def predict(params: Any, model_state: Any, x: jax.Array) -> Any:
        # In train mode, as the gradient sees the model.
        logits, model_state = models.apply(model, params, model_state, x, train=True)
        return likelihood.distribution(logits), (logits, model_state)

    fisher = ko.fisher(predict, subsample=config.get("subsample") or None, has_aux=True)
    params, model_state = jax.eval_shape(lambda key: models.init(model, key, x), jax.random.key(0))
    curved = Curved(fisher.layers(params, model_state, x), _options(config, optimizer, steps))
    extra = _extra_of_adaptive(config, fisher) if optimizer.adaptive else _extra(fisher)
    in_one_pass = None
    if curved.options.get("factored_gradient"):
        in_one_pass = fisher.value_and_grad(
            lambda prediction, targets: prediction.mean_nll(targets)
        )
    return Method(
        lambda rate: optimizer.build(config, curved, scheduled(rate)),
        extra,
        None if optimizer.every_step else _due(optimizer, curved),
        in_one_pass,
    )


def _options(config: ml_collections.ConfigDict, optimizer: Optimizer, steps: int) -> dict[str, Any]:
    options = config.kfac.to_dict()
    if optimizer.low_rank:
        options |= config.low_rank.to_dict() if "low_rank" in config else {}
    if not optimizer.adaptive:
        return schedules.resolve(options, steps=steps, where="config.kfac")
    own = config.adaptive.to_dict() if "adaptive" in config else {}
    return {k: options[k] for k in _STRUCTURE if k in options} | schedules.resolve(
        own, steps=steps, where="config.adaptive"
    )


def _extra(fisher: Any) -> Callable[..., dict[str, Any]]:
    def extra(
        params: Any,
        model_state: Any,
        x: jax.Array,
        key: jax.Array,
        *,
        value: Any = None,
        value_fn: Any = None,
        grad: Any = None,
        measure: Any = None,
        refresh: Any = None,
        **due: Any,
    ):
        del value, value_fn, grad
        curvature = fisher.at(params, model_state, x, key=key) if measure in (None, True) else None
        return {"curvature": curvature, "refresh": refresh, **due}

    return extra


def _extra_of_adaptive(
    config: ml_collections.ConfigDict, fisher: Any
) -> Callable[..., dict[str, Any]]:
    def objective(value: Any, params: Any) -> Any:
        return value + config.weight_decay / 2 * optax.tree.norm(params, squared=True)

    def extra(
        params: Any,
        model_state: Any,
        x: jax.Array,
        key: jax.Array,
        *,
        value: Any,
        value_fn: Any,
        grad: Any,
        **due: Any,
    ):
        del grad  # the transformation gets it with the weight decay
        return {
            "curvature": fisher.at(params, model_state, x, key=key),
            "value": objective(value, params),
            "value_fn": lambda params: objective(value_fn(params), params),
            **due,
        }

    return extra


def _due(optimizer: Optimizer, curved: Curved) -> ko.HostSchedule:
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
