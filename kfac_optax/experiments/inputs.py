"""What happens to a mini-batch between memory, where images stay bytes, and the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_KNOWN = {"mean", "std", "crop", "flip"}


def check(options: Mapping[str, Any]) -> None:
    """Raises a `ValueError` for an unknown entry of `config.inputs`."""
    if unknown := set(options) - _KNOWN:
        raise ValueError(f"config.inputs: got {sorted(unknown)}, expected only {sorted(_KNOWN)}")


def is_random(options: Mapping[str, Any]) -> bool:
    """Whether training sees a changed copy of each image."""
    return bool(options.get("crop") or options.get("flip"))


def pixels(x: jax.Array) -> jax.Array:
    """Bytes to numbers in [0, 1]; anything else as it is.

    >>> print(pixels(jnp.array([0, 255], jnp.uint8)), pixels(jnp.array([255])))
    [0. 1.] [255]
    """
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def normalise(x: jax.Array, *, mean: Sequence[float] = (), std: Sequence[float] = ()) -> jax.Array:
    """`(pixels(x) - mean) / std`, where both hold one number per channel or nothing."""
    # mean and std are those of numbers in [0, 1]
    x = pixels(x)
    if len(mean):
        x = x - jnp.asarray(mean, x.dtype)
    if len(std):
        x = x / jnp.asarray(std, x.dtype)
    return x


def augment(key: jax.Array, x: jax.Array, *, crop: int = 0, flip: bool = False) -> jax.Array:
    """Random translations and mirrored copies of images `[N, H, W, C]`.

    Args:
        key: every image draws its own change from it.
        x: the images, of any type.
        crop: each is padded by so many zeros on every side and cut back at a random place.
        flip: half of them are mirrored left to right.

    Returns:
        As many images of the same shape and type.
    """
    crop_key, flip_key = jax.random.split(key)
    if crop:
        # shifted by up to `crop` pixels in both directions
        padded = jnp.pad(x, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
        corners = jax.random.randint(crop_key, (len(x), 2), 0, 2 * crop + 1)

        def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), x.shape[1:])

        x = jax.vmap(cut)(padded, corners)
    if flip:
        # every second image, by chance
        mirrored = jax.random.bernoulli(flip_key, 0.5, (len(x), 1, 1, 1))
        x = jnp.where(mirrored, x[:, :, ::-1], x)
    return x


def training(
    options: Mapping[str, Any], key: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A mini-batch as the model is trained on it: changed at random, then normalised."""
    if is_random(options):
        x = augment(key, x, crop=options.get("crop", 0), flip=options.get("flip", False))
    return evaluation(options, x, y)


def evaluation(
    options: Mapping[str, Any], x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A mini-batch as the model is evaluated on it; targets that are images become numbers in [0,
    1].
    """
    # images as targets get the same scale as inputs
    return normalise(x, mean=options.get("mean", ()), std=options.get("std", ())), pixels(y)
