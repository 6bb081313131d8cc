"""Optimizers of the comparison made of the records of the catalogue: names, needs and builders."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import optax

import kfac_optax as ko
from kfac_optax.experiments.averages import average_of_finite
from kfac_optax.methods.gradient import mfac
from kfac_optax.methods.kfac import low_rank_records
from kfac_optax.methods.sample_space import smw, spring

# A float, a traced scalar (one compiled epoch serves every rate) or a schedule made of one.
Rate = Any
Build = Callable[[ml_collections.ConfigDict, "Curved | None", Rate], optax.GradientTransformation]
# Prediction with what else the model returns, losses `[N]`, and the part of the batch.
MakeEstimator = Callable[[Callable[..., Any], Callable[..., Any], Any], ko.Estimator]
# Layers, state of the optimizer, mean, key, `size=` and `weight_decay=` to parameters around it.
Draw = Callable[..., Any]

# Words of a configuration that some of its methods decide on themselves: corrections of directions,
# and the inverse where damping is exact.
OF_SOME = ("correct_every", "correct_share", "inverse")
# Labels that are no preset's name in capitals.
_LABELS = {
    "kfac": "K-FAC",
    "kfac_two_level": "two-level K-FAC",
    "kfac_adaptive": "K-FAC, adaptive",
    "kfac_two_level_adaptive": "two-level, adaptive",
    "noisy_kfac": "noisy K-FAC",
    "rs_kfac": "RS-KFAC",
    "eva": "Eva",
    "eva_f": "Eva-f",
    "hylo": "HyLo",
    "k_bfgs_l": "K-BFGS(L)",
    "smw": "natural gradient of the batch",
    "quasi_diagonal": "quasi-diagonal",
    "unitwise_natural": "unitwise natural gradient",
    "linear_natural": "K-FAC / L",
    "shampoo": "Shampoo",
    "distributed_shampoo": "distributed Shampoo",
    "eva_s": "Eva-s",
    "sketchy": "Sketchy",
    "jorge": "Jorge",
    "mfac": "M-FAC",
    "psgd_kron": "PSGD, Kronecker",
    "psgd_lra": "PSGD, low rank",
    "adahessian": "AdaHessian",
    "vadam": "Vadam",
}
# What measures inputs alone, or exact output columns; all others draw labels.
_MEASURED_BY = {
    "foof": ko.forward_only,
    "eva_f": ko.forward_only,
    "kflr": ko.ggn,
    "linear_natural": ko.ggn,
}


class Curved(NamedTuple):
    """What a preconditioner is built from.

    Attributes:
        layers: those that the library found in the model; None where gradients are enough.
        options: keyword arguments of the library, from `config.kfac` and a section for methods of
          its kind, or from `config.adaptive`; with their schedules.
    """

    layers: Any
    options: dict[str, Any]


def drawn_labels(predict: Callable[..., Any], losses: Any, subsample: Any) -> ko.Estimator:
    """The Fisher of the model, from labels drawn from it."""
    del losses
    return ko.fisher(predict, subsample=subsample, has_aux=True)


def own_losses(predict: Any, losses: Callable[..., Any], subsample: Any) -> ko.Estimator:
    """Gradients of the data's own losses."""
    del predict
    return ko.empirical_fisher(losses, subsample=subsample)


def recursion(predict: Callable[..., Any], losses: Any, subsample: Any) -> ko.Estimator:
    """KFRA's recursion through the layers."""
    del losses
    return ko.recursive_ggn(lambda *args: predict(*args)[0], subsample=subsample)


def _section_of(record: ko.Method) -> str:
    """The section of the configuration for methods of this kind."""
    sections = {
        "low_rank": low_rank_records.RECORDS,
        "sample_space": (*smw.RECORDS, *spring.RECORDS),
        "mfac": mfac.RECORDS,
    }
    mine = [name for name, known in sections.items() if any(record is other for other in known)]
    return "posterior" if record.name in _DRAWN else mine[0] if mine else ""


def _from_diagonal(layers: Any, opt_state: Any, params: Any, key: Any, **words: Any) -> Any:
    del layers
    return ko.sample_diagonal(opt_state, params, key, **words)


# whose authors average gradients, and whose second pass takes the step as it is
_AVERAGED = (ko.k_bfgs, ko.k_bfgs_l)
# those that follow a posterior
_DRAWN: dict[str, Draw] = {
    "noisy_kfac": ko.sample_params,
    "vadam": _from_diagonal,
    "vogn": _from_diagonal,
}


class Optimizer(NamedTuple):
    """One row of the comparison.

    Attributes:
        label: name in tables and figures.
        curvature: whether updates need `curvature=`, or something else that the estimator gives.
        build: config, layers and options if `curvature`, learning rate to the transformation.
        adaptive: whether it finds rate, momentum and damping itself: its updates need the loss, no
          grid is tried, and its options are those of `config.adaptive`.
        section: of the configuration, one of `settings.SECTIONS`, whose options come on top of those
          of `config.kfac`; `""` for none.
        momentum: where that of the configuration is: `"behind"` it, `"before"` it, as an average of
          gradients, or `""`, nowhere, as it has its own. The default of a whole optimizer says
          nothing.
        every_step: whether each update needs the curvature of its own batch, and nothing is ever
          due.
        products: whether each update needs products with the curvature, though statistics are due
          at times only.
        rated: whether there is a learning rate to choose.
        estimator: makes what the curvature comes from.
        value: whether updates need the loss of the batch.
        value_fn: whether they need it as a function of the parameters, for products with its
          Hessian.
        sampled: whether they need the gradient at labels drawn from the model.
        drawn: parameters from the posterior in its state, at which gradients are then taken.
    """

    label: str
    curvature: bool
    build: Build
    adaptive: bool = False
    section: str = ""
    momentum: str = "behind"
    every_step: bool = False
    products: bool = False
    rated: bool = True
    estimator: MakeEstimator = drawn_labels
    value: bool = False
    value_fn: bool = False
    sampled: bool = False
    drawn: Draw | None = None

    @property
    def tuned(self) -> bool:
        """Whether the grid of learning rates is tried."""
        return self.rated and not self.adaptive


def of_record(record: ko.Method) -> Optimizer:
    """One method of the catalogue, in the configuration of the experiment."""
    preset = getattr(ko, record.name)
    whole, of_loss = record.kind == "optimizer", "value_fn" in record.needs
    adaptive = whole and of_loss
    build = adaptive_preset(preset) if adaptive else whole_preset(preset) if whole else None
    momentum = momentum_of(preset)
    build = averaged_before(preset) if momentum == "before" else build
    own = _MEASURED_BY.get(record.name)
    made = _of_model(own) if own is not None else drawn_labels
    return Optimizer(
        _LABELS.get(record.name, record.name.upper().replace("_", "-")),
        # gradients at drawn labels come from the estimator too
        bool({"curvature", "sampled"} & record.needs),
        build or preset_before_sgd(preset),
        adaptive=adaptive,
        section=_section_of(record),
        momentum=momentum or ("behind" if whole else ""),
        every_step=record.block_of is None,
        # those of a bound on the whole movement too
        products=(whole and record.block_of is not None) or takes_bound(preset),
        rated=not whole or "learning_rate" in inspect.signature(preset).parameters,
        estimator=own_losses if "losses" in record.needs else made,
        value="value" in record.needs,
        value_fn=of_loss and not adaptive,
        sampled="sampled" in record.needs,
        drawn=_DRAWN.get(record.name),
    )


def takes_bound(preset: Callable[..., Any]) -> bool:
    """Whether a preset may bound the whole movement, which takes a product in every step."""
    return "bound" in inspect.signature(preset).parameters


def _of_model(make: Callable[..., ko.Estimator]) -> MakeEstimator:
    return lambda predict, losses, subsample: make(predict, subsample=subsample, has_aux=True)


def known_options(preset: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that a preset has a word for; those of `kfac` that mean nothing to it are dropped.

    What neither has is handed on, for the preset to refuse.
    """
    known, common = inspect.signature(preset).parameters, inspect.signature(ko.kfac).parameters
    return {
        word: value
        for word, value in options.items()
        if word in known or (word not in common and word not in OF_SOME)
    }


def _made(
    preset: Callable[..., Any], curved: Curved | None, rate: Rate, **more: Any
) -> tuple[Any, set[str]]:
    """The preset's transformation, with more words than those of the configuration, and the words
    it got.

    One of gradients alone keeps its defaults: `config.kfac` is about curvature.
    """
    known = inspect.signature(preset).parameters
    options = {} if curved is None else more | known_options(preset, curved.options)
    if "learning_rate" in known:
        options["learning_rate"] = rate
    layers = () if curved is None or "layers" not in known else (curved.layers,)
    return preset(*layers, **options), set(options)


def preset_before_sgd(preset: Callable[..., Any]) -> Build:
    """A preconditioner, with weight decay, momentum and the rate behind it, as far as it has none of
    its own.
    """

    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        # a second momentum would make a rate ten times as large
        momentum = config.momentum if momentum_of(preset) else None
        # a bound on the whole movement has to know what is behind it
        counted = {"momentum": momentum or 0.0} if takes_bound(preset) else {}
        tx, words = _made(preset, curved, rate, **counted)
        if "weight_decay" in words:  # which is then its own
            return optax.chain(tx, optax.sgd(rate, momentum=momentum))
        return preconditioned(tx, config, rate, momentum)

    return build


def whole_preset(preset: Callable[..., Any]) -> Build:
    """A whole optimizer, with weight decay in the gradient."""

    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        tx, _ = _made(preset, curved, rate)
        return optax.chain(optax.add_decayed_weights(config.weight_decay), tx)

    return build


def adaptive_preset(preset: Callable[..., Any]) -> Build:
    """A whole optimizer that finds its rate itself and knows of the weight decay."""

    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        del rate
        assert curved is not None
        decay = config.weight_decay  # in the objective, as the ratio of its reduction sees it
        tx = preset(curved.layers, weight_decay=decay, **curved.options)
        return optax.chain(optax.add_decayed_weights(decay), tx)

    return build


def momentum_of(preset: Callable[..., Any]) -> str:
    """Where momentum belongs, see `Optimizer`."""
    if preset in _AVERAGED:
        return "before"
    # one with decays of its own, as Adam's
    return "" if "b1" in inspect.signature(preset).parameters else "behind"


def averaged_before(preset: Callable[..., Any]) -> Build:
    """A whole optimizer of average gradients, with weight decay in these."""

    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        average = average_of_finite(config.momentum)
        return optax.chain(average, whole_preset(preset)(config, curved, rate))

    return build


def preconditioned(
    tx: Any, config: ml_collections.ConfigDict, rate: Rate, momentum: float | None
) -> Any:
    """Appends weight decay, momentum and the learning rate to a preconditioner."""
    # The decay is added to the preconditioned gradient, as the paper does: before it, the
    # preconditioner would rescale the decay and the KL clip would see it.
    return optax.chain(
        tx,
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=momentum),
    )
