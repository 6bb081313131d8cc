"""Fashion-MNIST, a fifth of it, classified by a small convolutional network: small enough for two
CPU cores.

Needs the files of Fashion-MNIST, `--config.data_dir=DIR` (the Debian package dataset-fashion-mnist
puts them into /usr/share/datasets/fashion-mnist). `--config.data.train=60_000` takes all of it.
`:race` has what a user would take instead beside K-FAC, all with one grid and two epochs.
"""

import ml_collections

from kfac_optax.experiments import racing

VARIANTS = ("default", "race")


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment; `variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"--config=...:{variant}: got {variant!r}, expected one of {VARIANTS}")
    data_dir = ml_collections.FieldReference("")
    config = ml_collections.ConfigDict(
        {
            "name": "fashion_mnist_cnn",
            "title": "Fashion-MNIST (12 000 images), small CNN",
            "data_dir": data_dir,
            "data": {
                "name": "fashion_mnist",
                "data_dir": data_dir,
                "train": 12_000,
                "test": 10_000,
            },
            "inputs": {"mean": (0.2860,), "std": (0.3530,)},  # of the training pixels
            "model": {
                "name": "small_cnn",
                "channels": (8, 16, 32),
                "hidden": (32,),
                "kernel": 3,
                "outputs": 10,
            },
            "likelihood": "categorical",
            "optimizers": (
                "sgd",
                "adam",
                "kfac",
                "two_level",
                "two_level_exact",
                "two_level_galerkin",
            ),
            "seeds": 3,
            "epochs": 5,
            "batch_size": 128,
            "learning_rate": 1e-2,
            "schedule": {},  # of the rate; none
            "momentum": 0.9,
            "weight_decay": 1e-3,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-2,
                "bound": "damped",  # KL-clip alone, as in the papers
                "curvature_every": 10,
                "inverse_every": 50,
                "inverse": "eigh",
            },
            "adaptive": {},  # options of kfac_adaptive and two_level_adaptive, which tune themselves
            # Second table: every optimizer at its best rate of this grid.
            "tune": True,
            "grid": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3),
            "targets": (0.6, 0.5, 0.4),
            "evaluation_batch": 1_000,
            "python_loop": True,  # convolutions in a compiled loop are slow on a CPU
            "workers": 2,  # processes, each with one thread; 1 trains and times one run at a time in this process
            "out": "",  # results/<name> when empty
        }
    )
    return config if variant == "default" else racing.as_race(config, epochs=2)
