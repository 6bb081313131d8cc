"""Handwritten digits of scikit-learn, classified by a tanh network of 20 layers without
normalisation.

Every hidden layer has 32 units, so the network is a chain of small layers that depend on each
other: what a coarse correction between layers is made for, without batch norm, which hides the
scale of a layer.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    return ml_collections.ConfigDict(
        {
            "name": "deep_tanh",
            "title": "handwritten digits, tanh MLP with 20 hidden layers of 32",
            "data": {"name": "digits", "train": 1_500, "test": 297},
            "model": {"name": "mlp", "widths": (32,) * 20},
            "likelihood": "categorical",
            "optimizers": (
                "sgd",
                "adam",
                "kfac_clipped",
                "two_level_clipped",
                "two_level_exact_clipped",
                "kfac_bounded",
                "two_level_bounded",
                "kfac",
                "two_level",
                "two_level_exact",
                "kfac_adaptive",
                "two_level_adaptive",
            ),
            "seeds": 3,
            "epochs": 20,
            "batch_size": 128,
            "learning_rate": 1e-2,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-3,
                "curvature_every": 10,
                "inverse_every": 20,
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
            "grid": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4),
            "targets": (1.0, 0.5, 0.2),
            "workers": 2,  # processes, each with one thread; 1 trains and times one run at a time in this process
            "out": "",  # results/<name> when empty
        }
    )
