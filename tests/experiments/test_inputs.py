import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax.experiments import inputs

X = jax.random.randint(jax.random.key(0), (64, 8, 8, 3), 1, 256).astype(jnp.uint8)


def test_bytes_are_normalised_per_channel():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (np.asarray(X) / 255 - np.array(mean)) / np.array(std)
    x, y = inputs.evaluation({"mean": mean, "std": std, "crop": 2, "flip": True}, X, jnp.arange(64))
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, jnp.arange(64))
    np.testing.assert_array_equal(inputs.evaluation({}, jnp.arange(64), X)[0], jnp.arange(64))


def test_a_crop_is_a_translation_of_at_most_its_size():
    padded = np.pad(X, ((0, 0), (2, 2), (2, 2), (0, 0)))
    changed = np.asarray(inputs.augment(jax.random.key(1), X, crop=2))
    assert changed.shape == X.shape and changed.dtype == np.uint8
    seen = set()
    for image, source in zip(changed, padded, strict=True):
        places = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if (source[i : i + 8, j : j + 8] == image).all()
        ]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 15  # of 25, drawn 64 times


def test_a_flip_mirrors_about_half_of_the_images():
    changed = np.asarray(inputs.augment(jax.random.key(1), X, flip=True))
    same, mirrored = (
        (changed == y).all((1, 2, 3)) for y in (np.asarray(X), np.asarray(X)[:, :, ::-1])
    )
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_augmentation_belongs_to_its_key():
    first, again, other = (
        inputs.augment(jax.random.key(k), X, crop=2, flip=True) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_unknown_entries_are_refused():
    with pytest.raises(ValueError, match=r"config.inputs: got \['pad'\], expected only"):
        inputs.check({"pad": 4})
