"""The coarse level over convolutions, attention, embeddings and shared weights, against the
curvature itself.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._tree import named_leaves, replace_leaves
from tests import oracles
from tests.layers.gradients import x64_params


class Vision(nn.Module):
    """Maps of unequal, non-square size, groups, a pooled head; normalisation without a row of its
    own.
    """

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (3, 2), strides=(1, 2), name="first")(x))
        x = jnp.tanh(
            nn.LayerNorm(name="norm")(nn.Conv(4, (2, 2), feature_group_count=2, name="grouped")(x))
        )
        x = jnp.tanh(nn.ConvTranspose(2, (2, 2), strides=(2, 1), use_bias=False, name="up")(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


class Language(nn.Module):
    """A sequence model whose table is also the head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 4, name="embed")
        x = embed(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return embed.attend(jnp.tanh(nn.Dense(4, name="up")(x)))


PROBLEMS = {
    "vision": (Vision(), np.random.default_rng(0).normal(size=(3, 4, 5, 2))),
    "language": (Language(), np.asarray([[0, 3, 3], [4, 1, 0]])),
}


def problem(name):
    model, x = PROBLEMS[name]
    x = jnp.asarray(x)
    params = x64_params(lambda key, x: model.init(key, x)["params"], x)
    estimator = ko.ggn(lambda p, x: ko.Normal(model.apply({"params": p}, x)))
    return estimator, params, x, estimator.layers(params, x)


def ones_of(params, layer, group):
    """The coarse vector of one group of a layer: ones on its weights and biases, zeros elsewhere."""
    leaves = {name: jnp.zeros_like(x) for name, x in named_leaves(params).items()}
    for name in (layer.kernel, layer.bias):
        if name is not None:  # groups are divided among the outputs, which come last
            x = leaves[name]
            q = x.shape[-1] // layer.groups
            leaves[name] = x.at[..., group * q : (group + 1) * q].set(1)
    return replace_leaves(params, leaves)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_exact_coarse_matrix_is_the_restricted_curvature(x64, name):
    estimator, params, x, layers = problem(name)
    plan = oracles.plan(layers, ko.coarse_correction("exact"))
    _, across = jax.jit(lambda p: estimator.at(p, x).statistics(plan))(params)
    vectors = [
        ones_of(params, layer, i) for layer in layers if layer.coupled for i in range(layer.copies)
    ]
    product = jax.jit(lambda p, v: estimator.vector_product(p, v, x))
    products = [product(params, v) for v in vectors]
    dot = lambda a, b: sum(
        float(jnp.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    dense = np.array([[dot(v, fw) for fw in products] for v in vectors])
    assert len(dense) == {"vision": 5, "language": 6}[name]
    np.testing.assert_allclose(across.fisher, dense, rtol=1e-8, atol=1e-10 * np.abs(dense).max())


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_factored_diagonal_is_the_sum_of_the_layers_own_factors(x64, name):
    """Channel sums of patches, tokens and projections are sums over the factors that the block
    itself measures.
    """
    estimator, params, x, layers = problem(name)
    plan = oracles.plan(layers, ko.coarse_correction("factored"))
    statistics, across = jax.jit(lambda p: estimator.at(p, x).statistics(plan))(params)
    row = 0
    for layer, factors in zip(layers, statistics, strict=True):
        if not layer.coupled:
            continue
        for i in range(layer.copies):
            if layer.kind not in ("embedding", "tied_embedding"):
                np.testing.assert_allclose(
                    across.inputs[row, row], factors.inputs[i].sum(), rtol=1e-9
                )
                np.testing.assert_allclose(
                    across.outputs[row, row], factors.outputs[i].sum(), rtol=1e-9
                )
            row += 1
    assert row == len(across.inputs)
