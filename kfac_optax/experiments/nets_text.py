"""Networks that predict the next character."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class CharTransformer(nn.Module):
    """Decoder-only transformer: causal attention, layer norm before each part, learned positions,
    untied head.

    `outputs` is the size of the vocabulary, of the embedding and of the head alike.
    """

    depth: int
    width: int
    heads: int
    outputs: int
    max_context: int = 512
    expansion: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps tokens `[N, T]` to the logits `[N, T, outputs]` of the tokens that follow them."""
        del train  # nothing in this model behaves differently in evaluation
        length = x.shape[1]
        if length > self.max_context:
            raise ValueError(
                f"config.data.context: got {length}, expected at most "
                f"config.model.max_context={self.max_context}"
            )
        mask = nn.make_causal_mask(x)
        normal = nn.initializers.normal(0.02)
        # Every example looks its positions up: a curvature estimate needs the derivatives of each.
        positions = jnp.broadcast_to(jnp.arange(length), x.shape)
        x = nn.Embed(self.outputs, self.width, embedding_init=normal, name="tokens")(x)
        x += nn.Embed(self.max_context, self.width, embedding_init=normal, name="positions")(
            positions
        )
        for _ in range(self.depth):
            # norm first, residual around it
            y = nn.LayerNorm()(x)
            x += self._attend(y, mask)
            y = nn.LayerNorm()(x)
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(self.expansion * self.width)(y)))
        return nn.Dense(self.outputs)(nn.LayerNorm()(x))

    def _attend(self, x: jax.Array, mask: jax.Array) -> Any:
        return nn.MultiHeadDotProductAttention(num_heads=self.heads, deterministic=True)(
            x, mask=mask
        )
