"""Classifiers of sequences of rows, with parameters that belong to no layer of Flax."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class RMSNorm(nn.Module):
    """`x rsqrt(mean(x**2) + epsilon) scale` by hand: `scale` is a bare parameter."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        # a parameter that no module of Flax owns
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon) * scale


class RMSTransformer(nn.Module):
    """Transformer whose norms are `RMSNorm`; the mean over the rows is classified."""

    outputs: int
    depth: int = 2
    width: int = 32
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps rows `[N, T, features]` to logits `[N, outputs]`."""
        del train  # nothing in this model behaves differently in evaluation
        x = nn.Dense(self.width)(x)
        for _ in range(self.depth):
            y = RMSNorm()(x)
            # residual streams: attention, then a network on every row
            attended: Any = nn.MultiHeadDotProductAttention(
                num_heads=self.heads, deterministic=True
            )(y)
            x += attended
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(RMSNorm()(x))))
        return nn.Dense(self.outputs)(RMSNorm()(x).mean(1))


class RowLSTM(nn.Module):
    """LSTM over the rows: a bare offset is added to its inputs, a bare scale multiplies its last
    output.
    """

    outputs: int
    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps rows `[N, T, features]` to logits `[N, outputs]`."""
        del train  # nothing in this model behaves differently in evaluation
        x += self.param("offset", nn.initializers.zeros, x.shape[-1:])
        # the last state of the recurrence
        hidden: Any = nn.RNN(nn.LSTMCell(self.width))(x)
        return nn.Dense(self.outputs)(
            hidden[:, -1] * self.param("scale", nn.initializers.ones, (self.width,))
        )
