"""Small data files of the published formats."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
BATCHES = (
    "data_batch_1",
    "data_batch_2",
    "data_batch_3",
    "data_batch_4",
    "data_batch_5",
    "test_batch",
)


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_idx(
    directory: Path, *, train: int = 24, test: int = 10, side: int = 28, packed: bool = True
) -> list:
    """Writes the four files; returns the arrays in them."""
    rng = np.random.default_rng(0)
    arrays = []
    for name, count in zip(NAMES, (train, train, test, test), strict=True):
        shape, high = ((count, side, side), 256) if "images" in name else ((count,), 10)
        arrays.append(rng.integers(0, high, shape, dtype=np.uint8))
        if packed:
            (directory / f"{name}.gz").write_bytes(gzip.compress(idx(arrays[-1]), mtime=0))
        else:
            (directory / name).write_bytes(idx(arrays[-1]))
    return arrays


def write_cifar10(
    directory: Path, *, per_file: int = 4, pickled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the six batches; returns their pixels `[6 per_file, 3072]` and labels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, per_file, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, (6, per_file), dtype=np.uint8)
    for name, x, y in zip(BATCHES, pixels, labels, strict=True):
        if pickled:
            content = {b"data": x, b"labels": [int(n) for n in y], b"batch_label": b"a batch"}
            (directory / name).write_bytes(pickle.dumps(content, protocol=2))
        else:
            (directory / f"{name}.bin").write_bytes(
                np.concatenate([y[:, None], x], axis=1).tobytes()
            )
    return pixels.reshape(-1, 3072), labels.reshape(-1)
