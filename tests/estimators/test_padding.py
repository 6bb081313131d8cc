"""Padding of weight zero counts as dropped, whatever it holds: NaN and infinity never meet a
statistic or a product.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.engine.choice import blocks_of
from kfac_optax.estimators.plan import Plan
from tests import oracles
from tests.layers.gradients import x64_params

pytestmark = pytest.mark.usefixtures("x64")
N, KEPT, T = 6, 4, 4


class Zoo(nn.Module):
    """Every kind of layer, with one row of outputs per example."""

    @nn.compact
    def __call__(self, x, tokens):
        h = nn.Embed(5, 4, name="embed")(tokens) * x
        h = nn.LayerNorm(name="norm")(nn.Dense(4, name="dense")(h))
        h = jnp.tanh(nn.Conv(4, (3,), name="conv")(h))
        h = h + nn.Einsum((2, 2, 2), "ntgi,gio->ntgo", name="groups")(
            h.reshape(*h.shape[:2], 2, 2)
        ).reshape(h.shape)
        h = nn.RNN(nn.GRUCell(3, param_dtype=jnp.float64), name="rnn")(h)
        return nn.Dense(2, name="head")(h.mean(1))


class Pointwise(nn.Module):
    """Positions that do not see each other, each with a label."""

    @nn.compact
    def __call__(self, x, tokens):
        embed = nn.Embed(5, 4, name="embed")
        h = nn.LayerNorm(name="norm")(nn.Dense(4, name="dense")(embed(tokens) * x))
        return embed.attend(jnp.tanh(h))


class Chain(nn.Module):
    """Dense layers with one row per example."""

    @nn.compact
    def __call__(self, x, tokens):
        return nn.Dense(2, name="head")(jnp.tanh(nn.Dense(3, name="dense")(x[:, 0])))


def batches(per_position, value):
    """Arguments with padding of weight zero, and those without it."""
    x, tokens = (
        oracles.normal(0, (N, T, 4)),
        jnp.asarray(np.random.default_rng(1).integers(0, 5, (N, T))),
    )
    if per_position:
        weights = jnp.ones((N, T)).at[:, 2:].set(0)
        return (x.at[:, 2:].set(value), tokens, weights), (x[:, :2], tokens[:, :2], weights[:, :2])
    weights = jnp.ones(N).at[KEPT:].set(0)
    return (x.at[KEPT:].set(value), tokens, weights), (x[:KEPT], tokens[:KEPT], weights[:KEPT])


BLOCKS = {
    "kronecker": blocks_of(ko.kronecker()),
    "thinned": blocks_of(ko.kronecker(positions=2)),
    "reduce": blocks_of(ko.kronecker(sharing="reduce")),
    "sua and recurrent": blocks_of(ko.kronecker(), convolution="sua", recurrence="option2"),
    "sketches": blocks_of(ko.low_rank(2)),
    "diagonal": blocks_of(ko.kronecker(), normalization="diagonal"),
}


def both(model, per_position, value, block_of, coupling=None, make=ko.ggn):
    """What is measured with the padding and without it, as products with a random matrix, and the
    coupling's numbers.
    """
    with_padding, without = batches(per_position, value)
    params = x64_params(lambda key, *a: model.init(key, *a[:2])["params"], *without)
    predict = lambda p, x, t, w: ko.Categorical(model.apply({"params": p}, x, t), weights=w)
    estimator = make(predict)
    results = []
    for args in (with_padding, without):
        layers = estimator.layers(params, *args)
        plan = Plan(layers.layers, tuple(map(block_of, layers)), coupling, jnp.float64)
        measured, across = jax.jit(lambda a, plan=plan: estimator.at(params, *a).statistics(plan))(
            args
        )
        v = [oracles.normal(i, (layer.copies, *layer.shape)) for i, layer in enumerate(layers)]
        products = [
            jax.vmap(b.multiply)(s, w) for b, s, w in zip(plan.blocks, measured, v, strict=True)
        ]
        results.append((dict(zip([x.path for x in layers], products, strict=True)), across))
    return results


def assert_same(got, want):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert np.isfinite(b).all() and np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_reads_no_padded_example(name, value):
    assert_same(*both(Zoo(), False, value, BLOCKS[name]))


@pytest.mark.parametrize("name", ["kronecker", "reduce", "diagonal"])
def test_every_block_reads_no_padded_position(name):
    got, want = both(Pointwise(), True, np.nan, BLOCKS[name])
    assert_same(got, want)


@pytest.mark.parametrize(
    ("coarse", "model"), [("exact", Zoo()), ("exact", Pointwise()), ("factored", Zoo())]
)
def test_the_coarse_level_reads_no_padding(coarse, model):
    per_position = isinstance(model, Pointwise)
    assert_same(
        *both(model, per_position, np.nan, BLOCKS["kronecker"], ko.coarse_correction(coarse))
    )


def test_neighbours_read_no_padding():
    assert_same(
        *both(Chain(), False, np.nan, blocks_of(ko.kronecker("cholesky")), ko.tridiagonal())
    )


def test_inputs_alone_read_no_padding():
    assert_same(*both(Zoo(), False, np.nan, BLOCKS["kronecker"], make=ko.forward_only))


@pytest.mark.parametrize("per_position", [False, True])
def test_quadratic_forms_read_no_padding(per_position):
    model = Pointwise() if per_position else Zoo()
    with_padding, without = batches(per_position, np.nan)
    params = x64_params(lambda key, *a: model.init(key, *a[:2])["params"], *without)
    estimator = ko.ggn(
        lambda p, x, t, w: ko.Categorical(model.apply({"params": p}, x, t), weights=w)
    )
    directions = [jax.tree.map(jnp.sin, params), jax.tree.map(jnp.cos, params)]
    form = jax.jit(lambda a: estimator.at(params, *a).quadratic_form(directions))
    assert_same(form(with_padding), form(without))


def test_statistics_from_a_shared_pass_read_no_padding():
    """Rows are kept there until it is known what to measure."""
    with_padding, without = batches(False, np.nan)
    params = x64_params(lambda key, *a: Zoo().init(key, *a[:2])["params"], *without)
    estimator = ko.ggn(
        lambda p, x, t, w: ko.Categorical(Zoo().apply({"params": p}, x, t), weights=w)
    )
    plan = oracles.plan(estimator.layers(params, *without), ko.coarse_correction("exact"))

    def shared(args):
        step = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        return step(params, *args, targets=jnp.zeros(len(args[0]), int))[2].statistics(plan)

    at = estimator.at(params, *without)
    assert_same(jax.jit(shared)(with_padding), jax.jit(lambda: at.statistics(plan))())


def test_a_nan_that_counts_is_not_hidden():
    model, x = Chain(), jnp.ones((N, T, 4)).at[0].set(np.nan)
    params = x64_params(lambda key, x: model.init(key, x, None)["params"], x)
    estimator = ko.ggn(
        lambda p, x, w: ko.Categorical(model.apply({"params": p}, x, None), weights=w)
    )
    args = x, jnp.ones(N).at[1].set(0)
    measured, _ = estimator.at(params, *args).statistics(
        oracles.plan(estimator.layers(params, *args))
    )
    assert all(np.isnan(v).any() for v in jax.tree.leaves(measured))
