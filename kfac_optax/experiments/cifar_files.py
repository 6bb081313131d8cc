"""The CIFAR-10 files, binary or pickled by Python, as they are published."""

import functools
import importlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from kfac_optax.experiments.idx_files import Images

_SIDE, _CLASSES = 32, 10
_PIXELS = 3 * _SIDE * _SIDE
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = "test_batch"


@functools.lru_cache(maxsize=1)  # every seed takes its part of the same files
def read_cifar10(directory: Path, *, per_file: int = 10_000) -> Images:
    """Reads the six batches of CIFAR-10.

    Args:
        directory: holds the batches, or the unpacked directory of them.
        per_file: images of one batch.

    Returns:
        Images `[N, 32, 32, 3]` and their labels.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or has another content.
    """
    folder, suffix = _folder(directory)
    read = _read_binary if suffix else _read_pickle
    batches = [read(folder / (name + suffix), per_file) for name in (*_TRAIN, _TEST)]
    images, labels = zip(*batches, strict=True)
    return Images(np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1])


def _folder(directory: Path) -> tuple[Path, str]:
    """Where the batches are, and how their names end: `.bin` or nothing."""
    for folder in (
        directory,
        directory / "cifar-10-batches-bin",
        directory / "cifar-10-batches-py",
    ):
        for suffix in (".bin", ""):
            names = [name + suffix for name in (*_TRAIN, _TEST)]
            there = [(folder / name).is_file() for name in names]
            if all(there):
                return folder, suffix
            if any(there):
                missing = folder / names[there.index(False)]
                raise FileNotFoundError(
                    f"config.data_dir: {missing} is missing beside the others, expected "
                    f"{', '.join(names)}"
                )
    raise FileNotFoundError(
        f"config.data_dir: no CIFAR-10 batches in {directory}, expected data_batch_1 to "
        "data_batch_5 and test_batch, pickled or with the ending .bin, there or in "
        "cifar-10-batches-py or cifar-10-batches-bin. Unpack cifar-10-python.tar.gz or "
        "cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html and pass "
        "--config.data_dir=DIR."
    )


def _read_binary(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    content = np.fromfile(path, np.uint8)
    record = 1 + _PIXELS
    if content.size != count * record:
        raise ValueError(
            f"{path}: got {content.size} bytes, expected {count * record}: {count} records of a "
            f"label and {_PIXELS} pixels. The file is damaged: unpack it again."
        )
    records = content.reshape(count, record)
    return _images(path, records[:, 1:], records[:, 0])


def _read_pickle(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        entries = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        pixels, labels = np.asarray(entries["data"]), np.asarray(entries["labels"])
    except (
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        KeyError,
        ValueError,
        IndexError,
    ) as error:
        raise ValueError(
            f"{path}: got {type(error).__name__} ({error}), expected a pickled dictionary with "
            "'data' and 'labels'. The file is damaged or another one: unpack it again."
        ) from error
    if pixels.shape != (count, _PIXELS) or pixels.dtype != np.uint8 or labels.shape != (count,):
        raise ValueError(
            f"{path}: got data {pixels.shape} of {pixels.dtype} and labels {labels.shape}, "
            f"expected ({count}, {_PIXELS}) of uint8 and ({count},)"
        )
    return _images(path, pixels, labels)


def _images(path: Path, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(labels) and not 0 <= labels.min() <= labels.max() < _CLASSES:
        raise ValueError(
            f"{path}: got labels from {labels.min()} to {labels.max()}, expected 0 to "
            f"{_CLASSES - 1}"
        )
    images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int32)


class _Unpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers only: a pickle could otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        core = module.replace("numpy.core", "numpy._core")  # the name before NumPy 2
        if (core, name) in _ALLOWED:
            return getattr(importlib.import_module(core), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")


_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}
