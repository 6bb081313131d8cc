"""Fully connected networks."""

import jax
from flax import linen as nn


class LinearMLP(nn.Module):
    """Linear network with batch normalization after each of its `depth` hidden layers."""

    depth: int
    width: int
    outputs: int
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps inputs `[N, features]` to logits `[N, outputs]`."""

        def dense(width: int) -> nn.Dense:
            # batch normalization has the offset
            return nn.Dense(width, use_bias=False, kernel_init=nn.initializers.he_uniform())

        for _ in range(self.depth):
            x = dense(self.width)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=self.bn_momentum)(x)
        return dense(self.outputs)(x)


class MLP(nn.Module):
    """Fully connected network with biases and tanh between its layers."""

    widths: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps inputs `[N, features]` to logits `[N, outputs]`."""
        del train  # nothing in this model behaves differently in evaluation
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)


class Autoencoder(nn.Module):
    """Encoder of `widths` whose last layer, the code, is linear; the decoder mirrors it. The other
    layers are tanh.
    """

    widths: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps pixels `[N, outputs]` to the logits of their reconstruction."""
        del train  # nothing in this model behaves differently in evaluation
        for width in self.widths[:-1]:
            x = nn.tanh(nn.Dense(width)(x))
        # the code is linear
        x = nn.Dense(self.widths[-1])(x)
        # the encoder backwards
        for width in reversed(self.widths[:-1]):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(self.outputs)(x)
