"""Data sets by name: every one is drawn or split anew for each seed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from kfac_optax.experiments import cifar_files, idx_files, text

_T = TypeVar("_T")


class Dataset(NamedTuple):
    """Arrays with examples on the leading axis; images are kept as bytes, a quarter of their size
    as numbers.
    """

    train_x: jax.Array
    train_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


def planted_linear(
    key: jax.Array, *, train: int, test: int, features: int, target_dim: int
) -> Dataset:
    """Gaussian inputs `[N, features]`, binary targets `[N, target_dim]` of a random linear net.

    The teacher is one linear layer without bias, initialised as the students are; a target is the
    sign of one of its outputs, so every data set can be fitted without error.
    """
    # teacher and inputs from keys of their own
    teacher_key, input_key = jax.random.split(key)
    teacher = nn.initializers.he_uniform()(teacher_key, (features, target_dim))
    x = jax.random.normal(input_key, (train + test, features))
    # targets that a linear net can fit
    y = (x @ teacher > 0).astype(jnp.float32)
    return Dataset(x[:train], y[:train], x[train:], y[train:])


def digits(
    key: jax.Array,
    *,
    train: int,
    test: int,
    reconstruct: bool = False,
    shape: Sequence[int] = (64,),
) -> Dataset:
    """The 1797 handwritten digits of scikit-learn, pixels `[N, *shape]` in [0, 1], labels `[N]`.

    With `reconstruct` the pixels are the targets too.
    """
    # any shape of 64 pixels: a vector, an image, rows
    if math.prod(shape) != 64:
        raise ValueError(
            f"config.data.shape: got {tuple(shape)}, expected one of 64 pixels, for example (8, 8, "
            "1)"
        )
    from sklearn.datasets import load_digits  # slow to import and needed by this data set alone

    images, labels = load_digits(return_X_y=True)
    if train + test > len(labels):
        raise ValueError(
            f"config.data: got train={train} and test={test}, expected at most {len(labels)} "
            "examples together"
        )
    # drawn anew for every seed, train and test apart
    order = jax.random.permutation(key, len(labels))[: train + test]
    # 16 shades of grey
    x = jnp.asarray(images, jnp.float32)[order].reshape(-1, *shape) / 16
    y = x if reconstruct else jnp.asarray(labels, jnp.int32)[order]
    return Dataset(x[:train], y[:train], x[train:], y[train:])


def fashion_mnist(
    key: jax.Array, *, data_dir: str, train: int, test: int, reconstruct: bool = False
) -> Dataset:
    """Fashion-MNIST, MNIST or what else has their files: images `[N, 28, 28, 1]` of uint8, labels
    `[N]`.

    With `reconstruct` the images are rows `[N, 784]`, and the targets too.
    """
    dataset = _part(key, idx_files.read_images(Path(data_dir)), train, test)
    if not reconstruct:
        return dataset
    # vectors of pixels, which are their own targets
    train_x, test_x = (x.reshape(len(x), -1) for x in (dataset.train_x, dataset.test_x))
    return Dataset(train_x, train_x, test_x, test_x)


def cifar10(
    key: jax.Array, *, data_dir: str, train: int, test: int, per_file: int = 10_000
) -> Dataset:
    """CIFAR-10: images `[N, 32, 32, 3]` of uint8, labels `[N]`."""
    return _part(key, cifar_files.read_cifar10(Path(data_dir), per_file=per_file), train, test)


def _part(key: jax.Array, images: idx_files.Images, train: int, test: int) -> Dataset:
    """Examples drawn from the training files and, apart, from the test files."""
    parts = []
    for name, part_key, count, x, y in (
        ("train", jax.random.fold_in(key, 0), train, images.train_x, images.train_y),
        ("test", jax.random.fold_in(key, 1), test, images.test_x, images.test_y),
    ):
        if count > len(x):
            raise ValueError(
                f"config.data.{name}: got {count}, expected at most the {len(x)} images in the "
                "files"
            )
        # all of them stay in the order of the files
        if count < len(x):
            order = np.asarray(jax.random.permutation(part_key, len(x)))[:count]
            x, y = x[order], y[order]
        parts += [jnp.asarray(x), jnp.asarray(y)]
    return Dataset(*parts)


def characters(key: jax.Array, *, train: int, test: int, context: int, file: str = "") -> Dataset:
    """Windows `[N, context]` of a text, by default Python's help; the target is the next character
    at each place.

    The test windows are those at the end of the text; where the training windows begin depends on
    the key.
    """
    tokens = text.read(file)
    held_out = test * context + 1
    # room for both parts, so that no window of the one is in the other
    room = len(tokens) - held_out - (train * context + 1)
    if room < 0:
        raise ValueError(
            f"config.data: got train={train} and test={test} windows of {context}, expected at "
            f"most {(len(tokens) - 2) // context} together in a text of {len(tokens)} characters"
        )
    # windows begin elsewhere for every seed
    shift = int(jax.random.randint(key, (), 0, min(room, context - 1) + 1))
    parts = (
        *text.windows(tokens[shift:], count=train, context=context),
        *text.windows(tokens[len(tokens) - held_out :], count=test, context=context),
    )
    return Dataset(*map(jnp.asarray, parts))


DATASETS = {
    "planted_linear": planted_linear,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "characters": characters,
}


def load(config: ml_collections.ConfigDict, key: jax.Array) -> Dataset:
    """Builds the data set that `config.name` names; the other entries are its arguments.

    Args:
        config: the `data` section of an experiment.
        key: decides what is drawn, or which examples are held out.

    Returns:
        The arrays, on the default device.

    Raises:
        ValueError: the name is unknown, or the data are damaged or fewer than asked for.
        FileNotFoundError: files are missing.
    """
    options = config.to_dict()
    return select(DATASETS, options.pop("name"), "config.data.name")(key, **options)


def select(table: Mapping[str, _T], name: Any, where: str) -> _T:
    """Returns `table[name]`, or raises a `ValueError` that lists the known names."""
    if name not in table:
        raise ValueError(f"{where}: got {name!r}, expected one of {sorted(table)}")
    return table[name]
