"""The idx files of MNIST and the data sets that copy its format, plain or gzipped."""

import functools
import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

_UNSIGNED_BYTE = 0x08
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class Images(NamedTuple):
    """Labelled images: pixels `[N, H, W, C]` of uint8 and labels `[N]` of int32."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@functools.lru_cache(maxsize=1)  # every seed takes its part of the same files
def read_images(directory: Path, *, height: int = 28, width: int = 28, classes: int = 10) -> Images:
    """Reads the four files of an MNIST-style data set.

    Args:
        directory: holds `FILES`, each as it is or with `.gz`.
        height: of an image.
        width: of an image.
        classes: labels have to be below this number.

    Returns:
        Images `[N, height, width, 1]` and their labels.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, too long, or of another shape.
    """
    parts = []
    # images and labels of both parts
    for images_name, labels_name in (FILES[:2], FILES[2:]):
        images_path, labels_path = find(directory, images_name), find(directory, labels_name)
        images, labels = read(images_path, ndim=3), read(labels_path, ndim=1)
        if images.shape[1:] != (height, width):
            raise ValueError(
                f"{images_path}: got images of shape {images.shape[1:]}, expected {(height, width)}"
            )
        if len(images) != len(labels):
            raise ValueError(
                f"{labels_path}: got {len(labels)} labels, expected {len(images)} as in "
                f"{images_path.name}"
            )
        if len(labels) and labels.max() >= classes:
            raise ValueError(
                f"{labels_path}: got label {labels.max()}, expected labels below {classes}"
            )
        # one channel
        parts += [images[..., None], labels.astype(np.int32)]
    return Images(*parts)


def find(directory: Path, name: str) -> Path:
    """The file `name` or `name.gz`, or its variant with a dot before `idx`."""
    # packages name the files in different ways
    candidates = [
        directory / f"{stem}{end}"
        for stem in (name, name.replace("-idx", ".idx"))
        for end in ("", ".gz")
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"config.data_dir: {directory / name} is missing, expected it there, plain or as "
        f"{name}.gz. Fashion-MNIST is in the Debian package dataset-fashion-mnist "
        "(/usr/share/datasets/fashion-mnist) and at "
        "https://github.com/zalandoresearch/fashion-mnist; pass --config.data_dir=DIR."
    )


def read(path: Path, *, ndim: int) -> np.ndarray:
    """Reads one idx file of unsigned bytes with `ndim` axes.

    Raises:
        ValueError: another type or number of axes, or another size than the header says.
    """
    content = _bytes(path)
    # four bytes, and four for the length of each axis
    start = 4 + 4 * ndim
    expected = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if len(content) < start or content[:4] != expected:
        raise ValueError(
            f"{path}: got the first bytes {content[:4].hex(' ') or 'nothing'}, expected "
            f"{expected.hex(' ')} (an idx file of unsigned bytes with {ndim} axes) and a header of "
            f"{start} bytes. Is the download complete?"
        )
    # big-endian
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=ndim, offset=4))
    size = int(np.prod(shape, dtype=np.int64))
    # a download that broke off has a whole header
    if len(content) - start != size:
        raise ValueError(
            f"{path}: got {len(content) - start} bytes of data, expected {size} for the shape "
            f"{shape} in its header. The file is damaged: fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    # gzip, deflate and early ends raise different errors
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path}: got a damaged gzip file ({error}), expected a whole one: fetch it again"
        ) from error
