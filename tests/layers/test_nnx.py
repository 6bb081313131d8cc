"""The NNX front end: every layer gives its own gradient back, and twins of linen models get the
same updates.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfac_optax as ko
from tests import oracles
from tests.layers.gradients import assert_gradients, squares


def flat(x):
    return x.reshape(len(x), -1)


class Zoo(nnx.Module):
    """One of everything on `[N, 5, 4]`."""

    def __init__(self, rngs):
        kw = {"rngs": rngs, "param_dtype": jnp.float64}
        self.line = nnx.Conv(4, 6, (3,), strides=2, feature_group_count=2, **kw)
        self.causal = nnx.Conv(4, 3, (2,), padding="CAUSAL", kernel_dilation=2, **kw)
        self.up = nnx.ConvTranspose(4, 2, (3,), strides=(2,), **kw)
        self.heads = nnx.LinearGeneral(4, (2, 3), **kw)
        self.einsum = nnx.Einsum("ntd,dhk->nthk", (4, 2, 3), (2, 3), **kw)
        self.batch = nnx.BatchNorm(4, **kw)
        self.norms = nnx.List(
            [
                nnx.LayerNorm(4, **kw),
                nnx.RMSNorm(4, **kw),
                nnx.GroupNorm(4, 2, **kw),
                nnx.InstanceNorm(4, **kw),
                nnx.LayerNorm(4, use_scale=False, **kw),
                nnx.LayerNorm(4, use_bias=False, **kw),
            ]
        )
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, **kw)
        self.rnn = nnx.RNN(nnx.GRUCell(4, 3, **kw))
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(4, 3, **kw))
        self.table = nnx.Embed(7, 4, **kw)

    def __call__(self, x, tokens):
        x = x + self.table(tokens)
        outs = [
            self.line(x),
            self.causal(x),
            self.up(x),
            self.heads(x),
            self.einsum(x),
            self.batch(x),
        ]
        outs += [jnp.sin(norm(x)) for norm in self.norms]
        outs += [self.attention(x), self.rnn(x), self.lstm(x), self.table.attend(x)]
        return jnp.concatenate(list(map(flat, outs)), 1)


def test_every_layer_gives_its_gradient_back(x64):
    graph, params, rest = nnx.split(Zoo(nnx.Rngs(0)), nnx.Param, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape)), params)

    def losses(params, x, tokens):
        return squares(nnx.merge(graph, params, rest, copy=True)(x, tokens))

    tokens = jnp.asarray([[0, 3, 3, 1, 1], [6, 1, 0, 2, 0]])
    layers = assert_gradients(losses, params, oracles.normal(1, (2, 5, 4)), tokens)
    assert {x.kind for x in layers} == {"conv", "dense", "einsum", "scale_shift", "tied_embedding"}


def test_running_statistics_are_left_as_the_model_leaves_them():
    """The normalised input is computed once more; the running averages must not notice."""
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 1

    def predict(params, x):
        model = nnx.merge(graph, params, rest, copy=True)
        out = model(x)
        return ko.Normal(jnp.concatenate([out, jnp.broadcast_to(model.mean[...], out.shape)], 1))

    jaxpr = jax.make_jaxpr(lambda p: predict(p, x).mean)(params)
    expected = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(params))[0]
    seen = ko.ggn(predict).value_and_grad(lambda prediction, _: prediction.mean[0, 3:].sum())
    loss, _, _ = seen(params, x)
    np.testing.assert_allclose(loss, expected[0, 3:].sum(), rtol=1e-6)


class LinenTwin(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2, name="norm")(nn.Conv(4, (3, 3), strides=2, name="conv")(x)))
        x = x.reshape(len(x), -1, 4)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(3, name="head")(x.mean(1))


class NNXTwin(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.GroupNorm(4, 2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = x.reshape(len(x), -1, 4)
        return self.head((x + self.attention(x)).mean(1))


@pytest.mark.parametrize("coarse", ["factored", "exact"])
def test_twins_of_linen_and_nnx_get_the_same_updates(coarse):
    x, y = jax.random.normal(jax.random.key(1), (4, 6, 6, 2)), jnp.arange(4) % 3
    graph, params = nnx.split(NNXTwin(nnx.Rngs(0)))
    linen = nnx.to_pure_dict(params)
    models = {
        "linen": (lambda p, x: ko.Categorical(LinenTwin().apply({"params": p}, x)), linen),
        "nnx": (lambda p, x: ko.Categorical(nnx.merge(graph, p)(x)), params),
    }
    updates = {}
    for name, (predict, params) in models.items():
        fisher = ko.fisher(predict)
        tx = optax.chain(
            ko.kfac_two_level(
                fisher.layers(params, x), learning_rate=0.1, damping=0.1, coarse=coarse
            ),
            optax.sgd(0.1),
        )

        @jax.jit
        def step(params, fisher=fisher, tx=tx, predict=predict):
            grads = jax.grad(lambda p: predict(p, x).mean_nll(y))(params)
            curvature = fisher.at(params, x, key=jax.random.key(2))
            return tx.update(grads, tx.init(params), params, curvature=curvature)[0]

        updates[name] = step(params)
    assert len(jax.tree.leaves(updates["linen"])) == 14
    pure = nnx.to_pure_dict(updates["nnx"])
    scale = max(float(jnp.abs(u).max()) for u in jax.tree.leaves(pure))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 * scale),
        updates["linen"],
        pure,
    )
