"""Handwritten digits of scikit-learn, classified by a small tanh network.

`:race` has what a user would take instead beside K-FAC, all with one grid: a run takes a second.
"""

import ml_collections

from kfac_optax.experiments import racing

VARIANTS = ("default", "race")


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment; `variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"--config=...:{variant}: got {variant!r}, expected one of {VARIANTS}")
    config = ml_collections.ConfigDict(
        {
            "name": "digits",
            "title": "handwritten digits, 64-128-64-10 tanh MLP",
            "data": {"name": "digits", "train": 1_500, "test": 297},
            "model": {"name": "mlp", "widths": (128, 64)},
            "likelihood": "categorical",
            "optimizers": (
                "sgd",
                "adam",
                "kfac",
                "two_level",
                "two_level_exact",
                "kfac_adaptive",
                "two_level_adaptive",
            ),
            "seeds": 3,
            "epochs": 30,
            "batch_size": 128,
            "learning_rate": 1e-3,
            "schedule": {},  # of the rate; none
            "momentum": 0.9,
            "weight_decay": 1e-3,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-3,
                "bound": "damped",  # KL-clip alone, as in the papers
                "curvature_every": 10,
                "inverse_every": 100,
                "inverse": "eigh",
            },
            "adaptive": {},  # options of kfac_adaptive and two_level_adaptive, which tune themselves
            # Rows within an epoch, and an end by the clock: for comparisons at equal seconds.
            "report_every": 0,  # steps between rows of metrics.csv; 0: one row an epoch
            "evaluate_every": 0,  # rows between evaluations, whose values the rows between repeat; 0: once an epoch
            "budget_seconds": 0.0,  # a run ends with the row in which its training has taken so long; 0: never
            # Second table: every optimizer at its best rate of this grid.
            "tune": True,
            "tune_seeds": 0,  # seeds that a rate is tried with, then the best gets the others; 0: all
            "grid": (1e-2, 3e-3, 1e-3, 1e-4),
            "targets": (0.2, 0.1, 0.05),
            "workers": 2,  # processes, each with one thread; 1 trains and times one run at a time in this process
            "out": "",  # results/<name> when empty
        }
    )
    return config if variant == "default" else racing.as_race(config, epochs=20, learning_rate=1e-2)
