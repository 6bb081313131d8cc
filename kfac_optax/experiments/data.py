"""Data sets by name: every one is drawn or split anew for each seed."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

_T = TypeVar("_T")


class Dataset(NamedTuple):
    """Arrays with examples on the leading axis."""

    train_x: jax.Array
    train_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


def planted_linear(key: jax.Array, *, train: int, test: int, features: int, target_dim: int) -> Dataset:
    """Gaussian inputs `[N, features]`, binary targets `[N, target_dim]` of a random linear net.

    The teacher is one linear layer without bias, initialised as the students are; a target is the
    sign of one of its outputs, so every data set can be fitted without error.
    """
    teacher_key, input_key = jax.random.split(key)
    teacher = nn.initializers.he_uniform()(teacher_key, (features, target_dim))
    x = jax.random.normal(input_key, (train + test, features))
    y = (x @ teacher > 0).astype(jnp.float32)
    return Dataset(x[:train], y[:train], x[train:], y[train:])


def digits(key: jax.Array, *, train: int, test: int) -> Dataset:
    """The 1797 handwritten digits of scikit-learn, pixels `[N, 64]` in [0, 1], labels `[N]`."""
    from sklearn.datasets import load_digits  # slow to import and needed by this data set alone

    images, labels = load_digits(return_X_y=True)
    if train + test > len(labels):
        raise ValueError(
            f"config.data: got train={train} and test={test}, expected at most {len(labels)} examples together"
        )
    order = jax.random.permutation(key, len(labels))[: train + test]
    x = jnp.asarray(images, jnp.float32)[order] / 16
    y = jnp.asarray(labels, jnp.int32)[order]
    return Dataset(x[:train], y[:train], x[train:], y[train:])


DATASETS = {"planted_linear": planted_linear, "digits": digits}


def load(config: ml_collections.ConfigDict, key: jax.Array) -> Dataset:
    """Builds the data set that `config.name` names; the other entries are its arguments.

    Args:
        config: the `data` section of an experiment.
        key: decides what is drawn, or which examples are held out.

    Returns:
        The arrays, on the default device.

    Raises:
        ValueError: the name is unknown.
    """
    options = config.to_dict()
    return select(DATASETS, options.pop("name"), "config.data.name")(key, **options)


def select(table: Mapping[str, _T], name: Any, where: str) -> _T:
    """Returns `table[name]`, or raises a `ValueError` that lists the known names."""
    if name not in table:
        raise ValueError(f"{where}: got {name!r}, expected one of {sorted(table)}")
    return table[name]
