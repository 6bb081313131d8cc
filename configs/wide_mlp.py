"""Handwritten digits of scikit-learn and a wide tanh network: where the inverses of K-FAC are the
cost.

Compares dense K-FAC with inverses of low rank, sketched and followed online, at equal seconds.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    return ml_collections.ConfigDict(
        {
            "name": "wide_mlp",
            "title": "handwritten digits, 64-2048-2048-10 tanh MLP",
            "data": {"name": "digits", "train": 1_500, "test": 297},
            "model": {"name": "mlp", "widths": (2048, 2048)},
            "likelihood": "categorical",
            "optimizers": (
                "sgd",
                "adam",
                "kfac",
                "rs_kfac",
                "b_kfac",
                "b_r_kfac",
                "b_kfac_c",
                "b_r_c",
            ),
            "seeds": 3,
            "epochs": 1000,
            "batch_size": 128,
            "learning_rate": 3e-3,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-2,
                "bound": "damped",  # KL-clip alone, as in the papers
                "curvature_every": 5,
                "inverse_every": 25,
                "inverse": "cholesky",
                "factored_gradient": True,  # of dense K-FAC too: gradients are preconditioned from their rows
            },
            # What comes on top for inverses of low rank. Defaults: corrections of a fifth at every
            # fifth statistic.
            "low_rank": {"rank": 128},
            # Rows within an epoch, and an end by the clock: for comparisons at equal seconds.
            "report_every": 5,  # steps between rows of metrics.csv; 0: one row an epoch
            "evaluate_every": 0,  # rows between evaluations, whose values the rows between repeat; 0: once an epoch
            "budget_seconds": 15.0,  # a run ends with the row in which its training has taken so long; 0: never
            # Second table: every optimizer at its best rate of this grid.
            "tune": True,
            "tune_seeds": 1,  # seeds that a rate is tried with, then the best gets the others; 0: all
            "grid": (3e-2, 1e-2, 3e-3, 1e-3),
            "per_optimizer": {
                "sgd": {"learning_rate": 3e-2, "grid": (3e-1, 1e-1, 3e-2, 1e-2)},
                "adam": {"learning_rate": 3e-4, "grid": (1e-3, 3e-4, 1e-4)},
            },
            "targets": (0.2, 0.05, 0.02, 0.01),
            "steps_per_call": 5,
            "python_loop": True,  # steps compiled without branches, what is due decided in Python
            "workers": 1,
            "out": "",  # results/<name> when empty
        }
    )
