"""Models made of Haiku's own modules; skipped where Haiku is not installed.

Biases that a normalisation or a softmax behind them makes useless are left out: nothing could be
compared.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.zoo.models import IMAGES, TOKENS, Model, N, draw


def of_haiku(network: Callable[..., Any], *inputs: Any) -> Model:
    """`network(hk, *inputs)` as a pure function of parameters drawn anew.

    State, such as running means, is what it is at the start, and what comes of it is dropped.
    """
    hk = pytest.importorskip("haiku")
    transformed = hk.transform_with_state(lambda *x: network(hk, *x))
    drawn = jax.tree.map(jnp.asarray, inputs)
    params, state = transformed.init(jax.random.key(0), *drawn)
    params = jax.tree.map(lambda x: draw(*x.shape) + (x.ndim == 1), params)

    def function(p, *x):
        return transformed.apply(p, state, jax.random.key(1), *x)[0]

    return Model(function, params, inputs)


def mlp(hk, x):
    """With dropout in training mode, the same mask in every call."""
    x = hk.nets.MLP([4, 4, 2], activation=jnp.tanh)(x, dropout_rate=0.2, rng=jax.random.key(2))
    return hk.Bias()(x * jnp.exp(hk.Linear(2)(jnp.tanh(x))))


def conv_net(hk, images):
    """Batch norm in training mode, through which examples interact; every kind of convolution."""
    x = hk.Conv2D(3, 3, with_bias=False)(images)
    x = jax.nn.silu(hk.BatchNorm(True, True, 0.9)(x, is_training=True))
    x = jax.nn.silu(hk.DepthwiseConv2D(1, 3)(x))
    x = jax.nn.silu(hk.Conv2D(4, 3, stride=2)(x))
    x = hk.GroupNorm(2)(x)
    x = jax.nn.silu(hk.Conv2DTranspose(2, 3, stride=2)(x))
    return hk.Linear(2)(hk.Flatten()(hk.avg_pool(x, 2, 2, "VALID")))


def lstm(hk, x):
    """An LSTM in time, a GRU behind it, both unrolled by a scan."""
    core = hk.LSTM(3)
    states, _ = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)
    core = hk.GRU(2)
    start = core.initial_state(len(x)).astype(x.dtype)
    states, _ = hk.dynamic_unroll(core, states, start, time_major=False)
    return hk.BatchApply(hk.Linear(2))(states)


def transformer(hk, tokens):
    """Pre-norm attention blocks over embedded tokens and their positions."""
    table, init = hk.Embed(5, 4), hk.initializers.Constant(0)
    x = table(tokens) + hk.get_parameter("positions", [3, 4], init=jnp.zeros)
    for _ in range(2):
        h = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(2, 2, with_bias=False, model_size=4, w_init=init)(h, h, h)
        h = hk.RMSNorm(-1)(x)
        x = x + hk.Linear(4)(jax.nn.gelu(hk.Linear(6)(h)))
    return x @ table.embeddings.T


def stack(hk, x):
    """Layers of one stack, scanned over, each recomputed for its derivative."""

    def layer(h):
        h = h + jnp.tanh(hk.Linear(3)(h))
        return hk.LayerNorm(-1, True, True)(h)

    return hk.Linear(2)(hk.layer_stack(2)(hk.remat(layer))(x))


MODELS = {
    "haiku mlp": lambda: of_haiku(mlp, draw(N, 3)),
    "haiku conv net": lambda: of_haiku(conv_net, IMAGES),
    "haiku recurrent": lambda: of_haiku(lstm, draw(N, 3, 2)),
    "haiku transformer": lambda: of_haiku(transformer, TOKENS),
    "haiku stack": lambda: of_haiku(stack, draw(N, 3)),
}
