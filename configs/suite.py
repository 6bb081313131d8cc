"""Five problems in one table: `python -m kfac_optax.experiments.suite --config=configs/suite.py`.

Two of them need the files of Fashion-MNIST, `--config.data_dir=DIR` (Debian package
dataset-fashion-mnist); they are left out without. Every entry of a problem is a flag, for example
`--config.experiments.deep_linear.epochs=5`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import ml_collections

# Changes of each problem's own configuration file, so that a run takes seconds rather than minutes.
_CHANGES: dict[str, dict[str, Any]] = {
    "deep_linear": {"epochs": 10, "targets": (0.2,)},
    "deep_tanh": {"targets": (0.5,)},
    "fashion_mnist_autoencoder": {
        "epochs": 2,
        "batch_size": 500,
        "budget_seconds": 0.0,
        "targets": (300.0,),
        "kfac": {"bound": "auto"},
    },
    "fashion_mnist_cnn": {
        "epochs": 3,
        "targets": (0.5,),
        "kfac": {"bound": "auto", "kl_clip": 1e-3},
    },
    "char_transformer": {"epochs": 3, "targets": (2.5,)},
}
_DATA = {
    "fashion_mnist_autoencoder": {"train": 20_000, "test": 2_000},
    "char_transformer": {"train": 2_000},
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings of the suite; `experiments` holds those of every problem."""
    config = ml_collections.ConfigDict(
        {
            "name": "suite",
            "title": "two-level K-FAC on five problems",
            "data_dir": "",
            "problems": tuple(_CHANGES),
            "optimizers": (
                "sgd",
                "adam",
                "kfac",
                "two_level",
                "two_level_exact",
                "kfac_bounded",
                "two_level_bounded",
                "kfac_adaptive",
                "two_level_adaptive",
            ),
            # these run at the problem's own rate only
            "untuned": (
                "kfac",
                "two_level",
                "two_level_exact",
                "kfac_bounded",
                "two_level_bounded",
            ),
            "seeds": 3,
            "tune_seeds": 1,  # seeds that a rate is tried with, then the best gets the others; 0: all
            "grid": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3),  # for the others
            "workers": 2,  # processes, each with one thread; 1 trains and times one run at a time in this process
            "out": "",  # results/<name> when empty
        }
    )
    config.experiments = ml_collections.ConfigDict({name: {} for name in _CHANGES})
    for name, changes in _CHANGES.items():
        experiment = _read(name)
        experiment.update(changes)
        experiment.data.update(_DATA.get(name, {}))
        config.experiments[name] = experiment
    # The autoencoder gives each preset a rate of its own; the exact coarse matrix gets that of the
    # factored one.
    own = config.experiments.fashion_mnist_autoencoder.per_optimizer
    for name in ("two_level_exact", "kfac_bounded", "two_level_bounded"):
        own[name] = ml_collections.ConfigDict(own.two_level.to_dict())
    return config


def _read(name: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
