"""Models of the same kinds made of the layers of linen, NNX and Equinox.

Without biases that a softmax behind them makes useless: nothing could be compared.
"""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.zoo.models import IMAGES, TOKENS, Model, N, draw


def of_linen(module: nn.Module, *inputs: Any, **options: Any) -> Model:
    """With parameters drawn anew, so that zero initialisations do not hide anything."""
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x), *inputs)["params"]
    params = jax.tree.map(lambda x: draw(*x.shape) + (x.ndim == 1), shapes)

    def function(p, *x):
        out, _ = module.apply({"params": p}, *x, mutable=["batch_stats"], **options)
        return out

    return Model(function, params, inputs)


class ResNet(nn.Module):
    """With batch norm in training mode, through which examples interact."""

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=False)
        x = nn.silu(norm()(nn.Conv(3, (3, 3))(x)))
        y = nn.silu(norm()(nn.Conv(4, (3, 3), (2, 2))(x)))
        y = nn.GroupNorm(num_groups=2)(nn.Conv(4, (3, 3))(y))
        x = nn.silu(y + nn.Conv(4, (1, 1), (2, 2), use_bias=False)(x))
        return nn.Dense(2)(x.mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        low = nn.silu(nn.Conv(3, (3, 3), (2, 2))(x))
        high = nn.silu(nn.ConvTranspose(2, (3, 3), (2, 2))(low))
        return nn.Conv(1, (1, 1))(jnp.concatenate([x, high], -1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.RMSNorm()(x)))), None


class Transformer(nn.Module):
    """Blocks in a stack, scanned over and recomputed, with a table that is also the head."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(5, 4)
        x = table(tokens) + self.param("positions", nn.initializers.normal(), (3, 4))
        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = stack()(x, None)
        return table.attend(x)


class Reader(nn.Module):
    """An LSTM in both directions, whose states are weighed by attention."""

    @nn.compact
    def __call__(self, x):
        # their first state has the dtype of the parameters that they would make
        wide = dict(param_dtype=jnp.result_type(float))
        cells = nn.LSTMCell(3, **wide), nn.OptimizedLSTMCell(3, **wide)
        both = nn.Bidirectional(*map(nn.RNN, cells))(x)
        weights = nn.softmax(nn.Dense(1, use_bias=False)(nn.tanh(nn.Dense(4)(both))), 1)
        return nn.Dense(2)(jnp.sum(weights * both, 1))


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4)(nn.tanh(nn.Dense(4)(x))))
        return jnp.concatenate([nn.Dense(3)(x), nn.Dense(1)(x)], -1)


class Mixed(nnx.Module):
    """A convolution, a norm and attention of NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.norm(self.conv(x))).reshape(len(x), -1, 4)
        return self.head(self.attention(x).mean(1))


class AutoEncoder(nnx.Module):
    """Down by a strided convolution, up by a transposed one, with an adapter beside a layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.Conv(2, 3, (3, 3), strides=2, rngs=rngs)
        self.code = nnx.LoRALinear(12, 4, lora_rank=2, rngs=rngs)
        self.decode = nnx.Linear(4, 12, rngs=rngs)
        self.up = nnx.ConvTranspose(3, 2, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        low = nnx.silu(self.down(x))
        wide = nnx.silu(self.decode(nnx.silu(self.code(low.reshape(len(x), -1)))))
        return self.up(wide.reshape(low.shape))


def of_nnx(module: nnx.Module, *inputs: Any) -> Model:
    """Parameters of an NNX module as a tree."""
    graph, state = nnx.split(module, nnx.Param)  # those of adapters are among them
    params = jax.tree.map(lambda x: draw(*x.shape) + (x.ndim == 1), nnx.to_pure_dict(state))

    def function(p, *x):
        filled = jax.tree.map(lambda v: v, state)
        nnx.replace_by_pure_dict(filled, p)
        return nnx.merge(graph, filled)(*x)

    return Model(function, params, inputs)


class Patches(eqx.Module):
    """A convolution and an MLP of Equinox, for one example."""

    conv: eqx.nn.Conv2d
    mlp: eqx.nn.MLP

    def __call__(self, x):
        return self.mlp(jnp.tanh(self.conv(x)).mean((1, 2)))


class Recurrent(eqx.Module):
    """A GRU over time, a norm, attention over its states, for one example."""

    cell: eqx.nn.GRUCell
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention

    def __call__(self, x):
        step = lambda h, now: (self.cell(now, h),) * 2
        _, states = jax.lax.scan(step, jnp.zeros(4), x)
        states = jax.vmap(self.norm)(states)
        return self.attention(states, states, states)


def of_equinox(module: eqx.Module, *inputs: Any) -> Model:
    """Arrays of an Equinox module as parameters."""
    arrays, rest = eqx.partition(module, eqx.is_array)
    params = jax.tree.map(lambda x: draw(*x.shape), arrays)
    return Model(
        lambda p, *x: jax.vmap(eqx.combine(p, rest))(*x),
        params,
        inputs,
    )


def _patches() -> Patches:
    keys = jax.random.split(jax.random.key(0))
    return Patches(
        eqx.nn.Conv2d(2, 3, 3, key=keys[0]), eqx.nn.MLP(3, 2, 4, 2, jax.nn.tanh, key=keys[1])
    )


def _recurrent() -> Recurrent:
    keys = jax.random.split(jax.random.key(0))
    cell, attention = (
        eqx.nn.GRUCell(2, 4, key=keys[0]),
        eqx.nn.MultiheadAttention(2, 4, key=keys[1]),
    )
    return Recurrent(cell, eqx.nn.LayerNorm(4), attention)


MODELS = {  # made when they are asked for: collecting tests stays cheap
    "linen resnet": lambda: of_linen(ResNet(), IMAGES),
    "linen u-net": lambda: of_linen(UNet(), IMAGES),
    "linen transformer": lambda: of_linen(Transformer(), TOKENS),
    "linen bi-lstm": lambda: of_linen(Reader(), draw(N, 3, 2)),
    "linen actor-critic": lambda: of_linen(ActorCritic(), draw(N, 3)),
    "nnx mixed": lambda: of_nnx(Mixed(nnx.Rngs(0)), IMAGES),
    "nnx autoencoder": lambda: of_nnx(AutoEncoder(nnx.Rngs(0)), IMAGES),
    "equinox recurrent": lambda: of_equinox(_recurrent(), draw(N, 3, 2)),
    "equinox patches": lambda: of_equinox(_patches(), np.moveaxis(IMAGES, -1, 1)),
}
