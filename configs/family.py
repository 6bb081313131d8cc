"""K-FAC and what a user would take instead, on handwritten digits: one grid for all of them."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the experiment."""
    return ml_collections.ConfigDict(
        {
            "name": "family",
            "title": "handwritten digits, 64-128-64-10 tanh MLP",
            "data": {"name": "digits", "train": 1_500, "test": 297},
            "model": {"name": "mlp", "widths": (128, 64)},
            "likelihood": "categorical",
            "optimizers": (
                "sgd",
                "adam",
                "muon",
                "shampoo",
                "soap",
                "kfac",
                "ekfac",
                "two_level",
                "kfac_bounded",
                "kfac_adaptive",
            ),
            "seeds": 3,
            "epochs": 15,
            "batch_size": 128,
            "learning_rate": 1e-2,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-3,
                "curvature_every": 5,
                "inverse_every": 20,
                "inverse": "eigh",
            },
            "adaptive": {},
            "report_every": 0,
            "evaluate_every": 0,
            "budget_seconds": 0.0,
            "tune": True,
            "tune_seeds": 0,
            "grid": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3),
            "targets": (0.2, 0.1, 0.05),
            "workers": 2,
            "out": "",
        }
    )
