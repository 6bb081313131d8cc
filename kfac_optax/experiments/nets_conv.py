"""Convolutional networks for small images."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

_he = nn.initializers.he_normal()


class SmallCNN(nn.Module):
    """Convolutions of stride 2, each followed by relu, then fully connected layers."""

    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    outputs: int
    kernel: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, outputs]`."""
        del train  # nothing in this model behaves differently in evaluation
        for channels in self.channels:
            x = nn.relu(
                nn.Conv(channels, (self.kernel, self.kernel), strides=2, kernel_init=_he)(x)
            )
        # [N, H, W, C] to [N, features]
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class VGG16(nn.Module):
    """VGG16 with batch normalization: 13 convolutions in five groups, then fully connected layers.

    `pooled` groups, the first ones, end in 2x2 max pooling: with 5 a 32x32 image ends as one place
    of 512 channels, with 4 as 2x2 places and the first fully connected layer has 2048 inputs.
    `width` scales the channels, `groups` are the numbers of convolutions.
    """

    outputs: int
    hidden: tuple[int, ...] = (4096, 4096)
    pooled: int = 5
    width: int = 64
    groups: tuple[int, ...] = (2, 2, 3, 3, 3)
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, outputs]`."""
        # batch statistics in training, running averages after it
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=self.bn_momentum
        )
        for group, layers in enumerate(self.groups):
            for _ in range(layers):
                # widths double from group to group, up to eight times
                x = nn.Conv(min(2**group, 8) * self.width, (3, 3), use_bias=False, kernel_init=_he)(
                    x
                )
                x = nn.relu(norm()(x))
            # the last groups of small images have nothing left to pool
            if group < self.pooled:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=_he)(x))
        return nn.Dense(self.outputs)(x)


class ResNet(nn.Module):
    """Residual network of the CIFAR family: depth `6n + 2`, three stages of `n` blocks of two 3x3
    convolutions.

    The stages have `width`, `2 width` and `4 width` channels. Where the shape changes, the shortcut
    takes every other pixel and adds channels of zeros: it has no parameters.
    """

    depth: int
    outputs: int
    width: int = 16
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[N, H, W, C]` to logits `[N, outputs]`."""
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(
                f"config.model.depth: got {self.depth}, expected 6 n + 2, for example 20 or 110"
            )
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=self.bn_momentum
        )
        x = nn.relu(norm()(_conv(self.width)(x)))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                # the first block of a stage halves the image
                x = _block(x, self.width * 2**stage, 2 if stage and not block else 1, norm)
        # mean over all pixels
        return nn.Dense(self.outputs)(x.mean((1, 2)))


def _conv(channels: int, stride: int = 1) -> nn.Conv:
    return nn.Conv(channels, (3, 3), strides=stride, use_bias=False, kernel_init=_he)


def _block(x: jax.Array, channels: int, stride: int, norm: Any) -> jax.Array:
    # no parameters in a shortcut: every other pixel, zeros for new channels
    shortcut = x[:, ::stride, ::stride]
    shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))
    # two convolutions of 3 x 3
    y = nn.relu(norm()(_conv(channels, stride)(x)))
    return nn.relu(norm()(_conv(channels)(y)) + shortcut)
