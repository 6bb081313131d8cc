"""A sweep that is small enough for a test."""

import functools
import importlib.util
from pathlib import Path

import ml_collections
import pytest

from kfac_optax.experiments import train

CONFIGS = Path(__file__).parents[2] / "configs"


def read_config(name: str, *variant: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant)


def small_deep_linear() -> ml_collections.ConfigDict:
    config = read_config("deep_linear")
    config.update(
        optimizers=("sgd", "adam"), seeds=2, epochs=2, batch_size=16, grid=(1e-1, 1e-3), workers=1
    )
    config.data.update(train=70, test=20, features=3)
    config.model.update(depth=2, width=4)
    config.kfac.update(curvature_every=1, inverse_every=2)
    return config


@pytest.fixture
def deep_linear():
    return small_deep_linear()


@pytest.fixture(scope="session")
def trainers():
    """Compiles each optimizer for `deep_linear` once."""
    return functools.cache(lambda name: train.prepare(small_deep_linear(), name))


@pytest.fixture
def digits():
    config = read_config("digits")
    config.update(epochs=4, batch_size=32)
    config.data.update(train=128, test=32)
    config.model.widths = (8,)
    return config
