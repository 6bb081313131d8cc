import jax
import ml_collections
import numpy as np
import pytest

from kfac_optax.experiments import data

PLANTED = {"name": "planted_linear", "train": 50, "test": 10, "features": 4, "target_dim": 3}


def planted(seed: int, **changes) -> data.Dataset:
    return data.load(ml_collections.ConfigDict({**PLANTED, **changes}), jax.random.key(seed))


def test_planted_targets_are_signs_of_a_linear_map():
    dataset = planted(0, train=500, target_dim=1)
    assert dataset.train_x.shape == (500, 4)
    assert dataset.train_y.shape == (500, 1)
    assert dataset.test_x.shape == (10, 4)
    signs = 2 * np.asarray(dataset.train_y) - 1
    # Every half space that the teacher cuts is found by the perceptron, without an error.
    weights = np.zeros((4, 1))
    for _ in range(2000):
        wrong = (dataset.train_x @ weights) * signs <= 0
        if not wrong.any():
            break
        weights += np.asarray(dataset.train_x).T @ (wrong * signs)
    assert not wrong.any()


def test_a_seed_decides_the_data_set():
    first, again, other = planted(0), planted(0), planted(1)
    np.testing.assert_array_equal(first.train_x, again.train_x)
    np.testing.assert_array_equal(first.train_y, again.train_y)
    assert not np.allclose(first.train_x, other.train_x)


def test_digits_are_split_without_overlap():
    config = ml_collections.ConfigDict({"name": "digits", "train": 1500, "test": 297})
    dataset = data.load(config, jax.random.key(0))
    assert dataset.train_x.shape == (1500, 64)
    assert dataset.test_y.shape == (297,)
    assert float(dataset.train_x.min()) == 0.0
    assert float(dataset.train_x.max()) == 1.0
    everything = np.concatenate([dataset.train_x, dataset.test_x])
    whole = data.load(
        ml_collections.ConfigDict({"name": "digits", "train": 1797, "test": 0}), jax.random.key(1)
    )
    np.testing.assert_array_equal(
        np.sort(everything.sum(1)), np.sort(np.asarray(whole.train_x).sum(1))
    )


def test_digits_take_any_shape_of_their_pixels():
    config = ml_collections.ConfigDict({"name": "digits", "train": 20, "test": 5})
    flat = data.load(config, jax.random.key(0))
    config.shape = (8, 8, 1)
    images = data.load(config, jax.random.key(0))
    np.testing.assert_array_equal(images.train_x, flat.train_x.reshape(20, 8, 8, 1))
    config.shape = (8, 7)
    with pytest.raises(ValueError, match="config.data.shape: got"):
        data.load(config, jax.random.key(0))


def test_too_many_digits_are_refused():
    config = ml_collections.ConfigDict({"name": "digits", "train": 1797, "test": 1})
    with pytest.raises(
        ValueError, match="config.data: got train=1797 and test=1, expected at most 1797"
    ):
        data.load(config, jax.random.key(0))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"config.data.name: got 'cifar', expected one of \['characters', 'cifar10', 'digits'",
    ):
        planted(0, name="cifar")
