"""The compared optimizers by name, each a function of the learning rate."""

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_collections
import optax

import kfac_optax as ko
from kfac_optax.experiments.catalogue_optimizers import (
    Build,
    Curved,
    Optimizer,
    Rate,
    of_record,
    preconditioned,
    preset_before_sgd,
    recursion,
    whole_preset,
)
from kfac_optax.methods.signature import flat_signature


def _sgd(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    del curved
    # theta <- theta - rate m, m of g + weight_decay theta
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum),
    )


def _adam(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    del curved
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(rate))


def _decoupled(optimizer: Callable[..., Any], **words: Any) -> Build:
    """One of Optax that subtracts the weight decay from the parameters itself."""

    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        del curved
        return optimizer(rate, weight_decay=config.weight_decay, **words)

    return build


def _sophia(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
    # gamma of Sophia-G, whose diagonal comes from labels drawn from the model
    diagonal = {"gamma": 0.05, "hessian_diagonal_fn": ko.gnb_estimator()}
    return _decoupled(optax.contrib.sophia, **diagonal)(config, curved, rate)


@flat_signature(ko.b_kfac, without=("coupling",))
def _online_two_level(layers: Any, **options: Any) -> Any:
    # the correction over blocks that are followed online
    return ko.b_kfac(layers, coupling=ko.coarse_correction(), **options)


@flat_signature(ko.kpsvd, without=("rank", "inverse"))
def _two_products(layers: Any, **options: Any) -> Any:
    return ko.kpsvd(layers, rank=2, **options)


def _variant(label: str, preset: Callable[..., Any], **words: Any) -> Optimizer:
    """A preset with other words than its defaults, whatever the configuration says of them."""

    def build(config: ml_collections.ConfigDict, curved: Curved | None, rate: Rate) -> Any:
        assert curved is not None
        # U, then the rate and momentum of SGD
        options = {"momentum": config.momentum} | curved.options | words
        tx = preset(curved.layers, learning_rate=rate, **options)
        return preconditioned(tx, config, rate, config.momentum)

    return Optimizer(label, True, build, products=True)


# The whole step, as an exact model wants it, within a bound that no configuration changes.
_EXACT = {"kl_clip": 1e-3, "bound": "exact"}

# What a user would take instead.
OF_OPTAX = ("sgd", "adam", "adamw", "lion", "sophia", "muon")
OPTIMIZERS = {
    "sgd": Optimizer("SGD", False, _sgd),
    "adam": Optimizer("Adam", False, _adam),
    "muon": Optimizer("Muon", False, whole_preset(optax.contrib.muon)),
    # every method of the catalogue by the name of its preset, and variants of some
    **{name: of_record(record) for name, record in ko.CATALOGUE.items()},
    # the same preset, measured by a recursion
    "kfra": of_record(ko.CATALOGUE["kflr"])._replace(label="KFRA", estimator=recursion),
    "kpsvd_two": Optimizer("KPSVD, two terms", True, preset_before_sgd(_two_products)),
    "two_level": _variant("two-level K-FAC", ko.kfac_two_level),
    "two_level_exact": _variant("two-level, exact", ko.kfac_two_level, coarse="exact"),
    "two_level_galerkin": _variant(
        "two-level, Galerkin", ko.kfac_two_level, coarse_damping="galerkin"
    ),
    # The bound of these is the default one in every experiment: it is not tuned.
    "kfac_bounded": _variant("K-FAC, bounded", ko.kfac, **_EXACT),
    "two_level_bounded": _variant(
        "two-level, bounded", ko.kfac_two_level, coarse="exact", balance="model", **_EXACT
    ),
    "two_level_adaptive": of_record(ko.CATALOGUE["kfac_two_level_adaptive"]),
    "b_kfac_two_level": Optimizer(
        "B-KFAC, two-level", True, preset_before_sgd(_online_two_level), section="low_rank"
    ),
    # last, as the place in this table decides the style in figures
    "kl_shampoo": Optimizer(
        "KL-Shampoo", False, whole_preset(partial(ko.shampoo, statistics="kl", decay=0.95))
    ),
    "kl_soap": Optimizer("KL-SOAP", False, whole_preset(partial(ko.soap, statistics="kl"))),
    "adamw": Optimizer("AdamW", False, _decoupled(optax.adamw)),
    "lion": Optimizer("Lion", False, _decoupled(optax.lion)),
    "sophia": Optimizer("Sophia-G", True, _sophia, every_step=True),
    # KL-clip alone, as in the papers
    "kfac_clipped": _variant("K-FAC, KL-clip", ko.kfac, bound="damped"),
    "two_level_clipped": _variant("two-level, KL-clip", ko.kfac_two_level, bound="damped"),
    "two_level_exact_clipped": _variant(
        "two-level exact, KL-clip", ko.kfac_two_level, coarse="exact", bound="damped"
    ),
}
