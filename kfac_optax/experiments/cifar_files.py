"""The CIFAR-10 files, binary or pickled by Python, as they are published."""

import functools
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
        pixels, labels = _as_array(entries["data"]), _as_array(entries["labels"])
    except Exception as error:  # what a damaged pickle raises has no common class
        if isinstance(error, OSError):  # the file itself cannot be read
            raise
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
    """Reads containers, numbers, bytes and arrays of bytes; no code that a pickle names runs.

    A pickle names functions to call. Here every name is looked up in `_STAND_INS`, which build
    inert descriptions, and nothing is imported.
    """

    def find_class(self, module: str, name: str) -> Any:
        core = module.replace("numpy.core", "numpy._core")  # the name before NumPy 2
        if (core, name) in _STAND_INS:
            return _STAND_INS[core, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")


class _Array:
    """What a pickle says about an array, until it is read."""

    def __init__(self, *_: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state  # (version, shape, dtype, whether columns come first, content)


class _DType:
    """The word for a type of numbers, for example `u1`."""

    def __init__(self, word: Any, *_: Any):
        self.word = word.decode() if isinstance(word, bytes) else word

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass  # the order of bytes, which single ones do not have


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order in ("F", b"F"), content))
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}, expected 'latin1'")
    return (text.decode() if isinstance(text, bytes) else text).encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


def _as_array(found: Any) -> np.ndarray:
    """An array of bytes as described, or a list of whole numbers."""
    if not isinstance(found, _Array):
        if not isinstance(found, list) or not all(type(x) is int for x in found):
            raise ValueError(f"a {type(found).__name__}, expected an array or a list of numbers")
        return np.array(found, np.int64)
    _, shape, dtype, columns_first, content = found.state
    if not isinstance(dtype, _DType) or dtype.word not in ("u1", "|u1"):
        raise ValueError(f"an array of {getattr(dtype, 'word', dtype)!r}, expected 'u1'")
    flat = np.frombuffer(content, np.uint8)
    return flat.reshape(shape, order="F" if columns_first else "C")
