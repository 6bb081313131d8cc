import gzip
import pathlib
import pickle
import re

import jax
import ml_collections
import numpy as np
import pytest

from kfac_optax.experiments import cifar_files, data, idx_files, text
from tests.experiments import data_files


def load(**options):
    return data.load(ml_collections.ConfigDict(options), jax.random.key(0))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_plain_and_packed(tmp_path, packed):
    arrays = data_files.write_idx(tmp_path, packed=packed)
    images = idx_files.read_images(tmp_path)
    np.testing.assert_array_equal(images.train_x[..., 0], arrays[0])
    np.testing.assert_array_equal(images.train_y, arrays[1])
    np.testing.assert_array_equal(images.test_x[..., 0], arrays[2])
    np.testing.assert_array_equal(images.test_y, arrays[3])
    assert images.train_x.dtype == np.uint8 and images.train_y.dtype == np.int32


def test_missing_idx_files_are_named_with_where_to_get_them(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train-images-idx3-ubyte is missing.*dataset-fashion-mnist"
    ):
        load(name="fashion_mnist", data_dir=str(tmp_path), train=2, test=2)
    data_files.write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte is missing"):
        load(name="fashion_mnist", data_dir=str(tmp_path), train=2, test=2)


def test_damaged_idx_files_are_refused(tmp_path):
    images, labels = data_files.write_idx(tmp_path, packed=False)[:2]
    path = tmp_path / data_files.NAMES[0]

    def refused(content: bytes, message: str, where=path):
        where.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            idx_files.read_images(tmp_path)
        where.unlink()

    whole = data_files.idx(images)
    refused(
        whole[:-1],
        rf"{path}: got {images.size - 1} bytes of data, expected {images.size} for the shape \(24, 28",
    )
    refused(whole + b"0", f"{path}: got {images.size + 1} bytes of data")
    refused(b"", f"{path}: got the first bytes nothing, expected 00 00 08 03")
    refused(data_files.idx(labels), "got the first bytes 00 00 08 01, expected 00 00 08 03")
    refused(data_files.idx(images[:, 1:]), r"got images of shape \(27, 28\), expected \(28, 28\)")
    refused(data_files.idx(images[1:]), "got 24 labels, expected 23 as in train-images-idx3-ubyte")
    packed = path.with_name(path.name + ".gz")
    refused(gzip.compress(whole)[:-9], f"{packed}: got a damaged gzip file", packed)
    refused(b"not packed", f"{packed}: got a damaged gzip file", packed)
    path.write_bytes(whole)
    refused(
        data_files.idx(labels + 10),
        "got label 1[0-9], expected labels below 10",
        tmp_path / data_files.NAMES[1],
    )


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("folder", ["", "own"])
def test_cifar_batches_are_read_in_both_formats(tmp_path, pickled, folder):
    directory = tmp_path / (
        ("cifar-10-batches-py" if pickled else "cifar-10-batches-bin") if folder else ""
    )
    directory.mkdir(exist_ok=True)
    pixels, labels = data_files.write_cifar10(directory, pickled=pickled)
    images = cifar_files.read_cifar10(tmp_path, per_file=4)
    assert images.train_x.shape == (20, 32, 32, 3) and images.test_x.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(np.concatenate([images.train_y, images.test_y]), labels)
    # The published order: all red rows, all green ones, all blue ones.
    np.testing.assert_array_equal(
        images.train_x[3, 5, 7], pixels[3, [5 * 32 + 7, 1024 + 5 * 32 + 7, 2048 + 5 * 32 + 7]]
    )
    np.testing.assert_array_equal(images.test_x[1, 0, 31, 2], pixels[21, 2048 + 31])


def test_missing_cifar_batches_are_named_with_where_to_get_them(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"no CIFAR-10 batches in .*https://www.cs.toronto.edu/~kriz/cifar.html",
    ):
        load(name="cifar10", data_dir=str(tmp_path), train=2, test=2)
    data_files.write_cifar10(tmp_path, pickled=False)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4.bin is missing beside the others"):
        load(name="cifar10", data_dir=str(tmp_path), train=2, test=2)


def test_damaged_cifar_batches_are_refused(tmp_path):
    data_files.write_cifar10(tmp_path, pickled=False)
    path = tmp_path / "data_batch_2.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match=f"{path}: got {len(whole) - 100} bytes, expected {len(whole)}: 4 records"
    ):
        cifar_files.read_cifar10(tmp_path, per_file=4)
    path.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(ValueError, match=f"{path}: got labels from . to 10, expected 0 to 9"):
        cifar_files.read_cifar10(tmp_path, per_file=4)


def test_damaged_cifar_pickles_are_refused(tmp_path):
    data_files.write_cifar10(tmp_path, pickled=True)
    path = tmp_path / "data_batch_3"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-100], "expected a pickled dictionary with 'data' and 'labels'"),
        (b"", "EOFError"),
        (pickle.dumps({"data": np.zeros((4, 3072), np.uint8)}), "KeyError"),
        (
            pickle.dumps({"data": np.zeros((4, 3071), np.uint8), "labels": [0] * 4}),
            r"got data \(4, 3071\) of uint8",
        ),
        (
            pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 3}),
            r"labels \(3,\), expected",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"{path}: got .*{message}" if "got" not in message else message
        ):
            cifar_files.read_cifar10(tmp_path, per_file=4)


class Malicious:
    """Leaves a file behind if it is unpickled the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _object_array(path):
    return {"data": np.array([Malicious(path)]), "labels": [0]}


# `__reduce__` of the same, hidden behind what a batch does need; names of the interpreter; a codec
# is found by importing a module of its name
PICKLES = {
    "call": lambda path: pickle.dumps({"data": Malicious(path), "labels": [0]}),
    "object array": lambda path: pickle.dumps(_object_array(path)),
    "object array of protocol 2": lambda path: pickle.dumps(_object_array(path), 2),
    "name": lambda path: b"cos\ngetcwd\n(tR.",
    "attribute": lambda path: b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93(tR.",
    "codec": lambda path: b"c_codecs\nencode\n(Vx\nVzlib\ntR.",
    "persistent": lambda path: b"Pname\n.",
    "extension": lambda path: b"\x82\x01.",
    "built": lambda path: b"cnumpy\nndarray\n(tR}S'state'\n(tsb.",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_cannot_run_code(kind, tmp_path):
    data_files.write_cifar10(tmp_path, pickled=True)
    left = tmp_path / "left behind"
    content = PICKLES[kind](left)
    if "protocol" in kind or kind in ("call", "object array"):
        pickle.loads(content)
        left.unlink()  # it does what it is for
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"(?s)data_batch_1: got \w+ \(.* expected a pickled dictionary"
    ):
        cifar_files.read_cifar10(tmp_path, per_file=4)
    assert not left.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_all_protocols_are_read(protocol, tmp_path):
    pixels, labels = data_files.write_cifar10(tmp_path, pickled=True)
    content = {"data": np.asfortranarray(pixels[:4]), "labels": [int(n) for n in labels[:4]]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content, protocol))
    images = cifar_files.read_cifar10(tmp_path, per_file=4)
    np.testing.assert_array_equal(images.train_x[2, 0, 0], pixels[2, [0, 1024, 2048]])


def test_nothing_else_unpickles():
    """`allow_pickle` is said wherever NumPy loads, and no other module reads a format that runs
    code.
    """
    root = pathlib.Path(__file__).parents[2]
    files = [
        path
        for name in ("kfac_optax", "benchmarks", "configs")
        for path in root.glob(f"{name}/**/*.py")
    ]
    assert len(files) > 100
    for path in files:
        code = path.read_text()
        assert code.count("np.load(") == code.count("allow_pickle=False"), path
        words = re.findall(
            r"^(?:import|from) (pickle|dill|shelve|marshal|joblib|cloudpickle)\b", code, re.M
        )
        assert words == (["pickle"] if path.name == "cifar_files.py" else []), path


def test_a_seed_draws_its_part_of_the_files(tmp_path):
    arrays = data_files.write_idx(tmp_path)
    config = ml_collections.ConfigDict(
        {"name": "fashion_mnist", "data_dir": str(tmp_path), "train": 8, "test": 10}
    )
    first, again, other = (data.load(config, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train_x, again.train_x)
    assert not np.array_equal(first.train_x, other.train_x)
    assert first.train_x.shape == (8, 28, 28, 1) and first.train_x.dtype == np.uint8
    # all of them: in the order of the file
    np.testing.assert_array_equal(first.test_x[..., 0], arrays[2])
    for image, label in zip(first.train_x, first.train_y, strict=True):
        (place,) = np.flatnonzero((arrays[0] == np.asarray(image)[..., 0]).all((1, 2)))
        assert arrays[1][place] == label
    with pytest.raises(
        ValueError, match=r"config.data.train: got 25, expected at most the 24 images"
    ):
        load(name="fashion_mnist", data_dir=str(tmp_path), train=25, test=10)


def test_images_to_be_reconstructed_are_their_own_targets(tmp_path):
    data_files.write_idx(tmp_path)
    dataset = load(name="fashion_mnist", data_dir=str(tmp_path), train=8, test=4, reconstruct=True)
    assert (
        dataset.train_x.shape == (8, 784)
        and dataset.train_y is dataset.train_x
        and dataset.test_y is dataset.test_x
    )
    digits = load(name="digits", train=8, test=4, reconstruct=True)
    np.testing.assert_array_equal(digits.train_x, digits.train_y)


def test_characters_are_followed_by_their_targets():
    dataset = load(name="characters", train=30, test=5, context=16)
    assert dataset.train_x.shape == (30, 16) and dataset.test_x.shape == (5, 16)
    np.testing.assert_array_equal(dataset.train_x[:, 1:], dataset.train_y[:, :-1])
    np.testing.assert_array_equal(dataset.train_x[1:, 0], dataset.train_y[:-1, -1])
    assert dataset.train_x.min() >= 0 and dataset.train_x.max() < text.VOCABULARY


def test_a_text_of_ones_own_is_read(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab\n€" * 20, encoding="utf-8")
    dataset = load(name="characters", train=5, test=2, context=8, file=str(path))
    assert set(np.unique(dataset.train_x)) == {
        0,
        text.CHARACTERS.index("a"),
        text.CHARACTERS.index("b"),
        text.UNKNOWN,
    }
    with pytest.raises(
        ValueError, match=r"got train=8 and test=2 windows of 8, expected at most 9 together"
    ):
        load(name="characters", train=8, test=2, context=8, file=str(path))
    with pytest.raises(FileNotFoundError, match=r"config.data.file: .*none.txt is missing"):
        load(name="characters", train=5, test=2, context=8, file=str(tmp_path / "none.txt"))
