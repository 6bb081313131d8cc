"""Deep autoencoder of Fashion-MNIST: 784-1000-500-250-30 and back, tanh, a linear code, Bernoulli
pixels.

The architecture of Hinton and Salakhutdinov (2006) on which Martens and Grosse (2015) tried K-FAC.
Needs the files of Fashion-MNIST, `--config.data_dir=DIR` (Debian package dataset-fashion-mnist).
Without files: `--config=configs/fashion_mnist_autoencoder.py:digits` trains a small one on the
digits of scikit-learn. `:race` has what a user would take instead beside K-FAC, all with one grid,
two epochs of a third of the images.
"""

import ml_collections

from kfac_optax.experiments import racing

VARIANTS = ("fashion_mnist", "digits", "race")


def get_config(variant: str = "fashion_mnist") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment; `variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"--config=...:{variant}: got {variant!r}, expected one of {VARIANTS}")
    data_dir = ml_collections.FieldReference("")
    config = ml_collections.ConfigDict(
        {
            "name": "fashion_mnist_autoencoder",
            "title": "Fashion-MNIST, deep autoencoder",
            "data_dir": data_dir,
            "data": {
                "name": "fashion_mnist",
                "data_dir": data_dir,
                "train": 60_000,
                "test": 10_000,
                "reconstruct": True,
            },
            "model": {"name": "autoencoder", "widths": (1000, 500, 250, 30)},
            "likelihood": "pixels",
            "optimizers": (
                "sgd",
                "adam",
                "kfac",
                "two_level",
                "kfac_adaptive",
                "two_level_adaptive",
            ),
            "seeds": 3,
            "epochs": 100,
            "batch_size": 1000,
            "learning_rate": 1e-3,
            "schedule": {},  # of the rate; none
            "momentum": 0.9,
            "weight_decay": 1e-5,
            "subsample": 250,  # images of a batch that statistics are taken from; 0: all of them
            "kfac": {
                "damping": 1e-1,
                "kl_clip": 1e-1,
                "bound": "damped",  # KL-clip alone, as in the papers
                "curvature_every": 5,
                "inverse_every": {"regular": 20, "warmup_steps": 20, "first": 5},
                "inverse": "cholesky",
            },
            # On top for inverses of low rank: add rs_kfac, b_kfac, ... to the optimizers.
            "low_rank": {"rank": 128},
            # Options of kfac_adaptive and two_level_adaptive, which tune themselves: exact products
            # on 125 images.
            "adaptive": {"model_subsample": 125},
            "per_optimizer": {
                "sgd": {"learning_rate": 3e-3, "grid": (1e-2, 3e-3, 1e-3)},
                "adam": {"learning_rate": 6e-4, "grid": (2e-3, 6e-4, 2e-4)},
                "kfac": {"learning_rate": 1e-1, "grid": (3e-1, 1e-1)},
                "two_level": {"learning_rate": 1e-1, "grid": (3e-1, 1e-1)},
                "rs_kfac": {"learning_rate": 1e-1, "grid": (3e-1, 1e-1)},
                "b_kfac": {"learning_rate": 1e-1, "grid": (3e-1, 1e-1)},
                "b_r_kfac": {"learning_rate": 1e-1, "grid": (3e-1, 1e-1)},
            },
            # Rows within an epoch, and an end by the clock: for comparisons at equal seconds.
            "report_every": 10,  # steps between rows of metrics.csv; 0: one row an epoch
            "evaluate_every": 0,  # rows between evaluations, whose values the rows between repeat; 0: once an epoch
            "budget_seconds": 60.0,  # a run ends with the row in which its training has taken so long; 0: never
            # Second table: every optimizer at its best rate of this grid.
            "tune": True,
            "tune_seeds": 1,  # seeds that a rate is tried with, then the best gets the others; 0: all
            "grid": (),  # see per_optimizer
            "targets": (237.0, 228.0, 217.0, 213.0),
            "evaluation_batch": 1_000,
            "steps_per_call": 10,
            "python_loop": True,  # steps compiled without branches, what is due decided in Python
            "checkpoint_every": 0,  # epochs; 0: only by the clock
            "checkpoint_seconds": 60,
            "workers": 1,
            "out": "",  # results/<name> when empty
        }
    )
    if variant == "digits":
        config.name, config.title = (
            "digits_autoencoder",
            "handwritten digits, 64-128-64-16 tanh autoencoder",
        )
        config.data = ml_collections.ConfigDict(
            {"name": "digits", "train": 1_500, "test": 297, "reconstruct": True}
        )
        config.model.widths = (128, 64, 16)
        config.update(epochs=1000, batch_size=128, budget_seconds=4.0, evaluation_batch=0)
        config.adaptive = ml_collections.ConfigDict()
        config.per_optimizer.adam.grid = (1e-2, 6e-3, 3e-3, 1e-3)
        config.targets = (22.0, 20.0, 18.0, 16.0)
    if variant == "race":
        racing.as_race(config, epochs=2, batch_size=500, data={"train": 20_000})
    return config
