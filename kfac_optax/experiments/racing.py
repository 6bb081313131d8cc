"""An experiment as a race of K-FAC and what a user would take instead."""

from typing import Any

import ml_collections

from kfac_optax.experiments.compared import OF_OPTAX

OF_GRADIENTS = ("shampoo", "kl_shampoo", "soap", "kl_soap")
OF_CURVATURE = ("kfac", "two_level", "kfac_adaptive", "two_level_adaptive")
GRID = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
# AdamW is used with a schedule: a tenth of the run to warm up, then half a cosine
_SCHEDULE = {"warmup": 0.1, "final": 0.0}


def as_race(config: ml_collections.ConfigDict, **changes: Any) -> ml_collections.ConfigDict:
    """Makes an experiment a race: all optimizers with the same grid, epochs and seeds.

    A rate is tried with one seed, the best one has three. `kfac_optax.experiments.race` makes a
    table of the results.

    Args:
        config: the experiment, which is changed; rates that it gives to single optimizers go.
        **changes: entries of the race alone, its epochs for example.

    Returns:
        The same configuration, by a name of its own.
    """
    config.name += "_race"
    config.optimizers = (*OF_OPTAX, *OF_GRADIENTS, *OF_CURVATURE)
    config.seeds, config.tune, config.tune_seeds, config.grid = 3, True, 1, GRID
    # all have the same epochs, as a schedule has to know their end, and but one a constant rate
    config.budget_seconds, config.schedule = 0.0, ml_collections.ConfigDict()
    # KL-clip alone, as in the papers
    config.kfac.update({"bound": "damped"})
    config.per_optimizer = ml_collections.ConfigDict({"adamw": {"schedule": _SCHEDULE}})
    config.update(changes)
    return config
