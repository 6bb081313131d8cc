"""The default inverse of each layer: exact damping of narrow ones, two products for wide ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.blocks.kronecker.kronecker import DenseInverse, EigenInverse
from kfac_optax.engine.choice import NARROW
from tests import helpers as h

WIDE = NARROW + 2
COMMON = dict(kl_clip=None, damping=0.05)


def predict(params, x):
    x = jnp.tanh(h.dense(x, params["wide"]))
    return ko.Normal(h.dense(x, params["narrow"]))


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    params = {
        "wide": jnp.asarray(rng.normal(size=(WIDE, 3)) / 12, jnp.float32),
        "narrow": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(7, WIDE)), jnp.float32)
    estimator = ko.ggn(predict)
    return params, x, estimator, estimator.layers(params, x)


def update(make, **options):
    params, x, estimator, layers = problem()
    tx = make(layers, **COMMON, **options)

    @jax.jit
    def run(params):
        at = estimator.at(params, x)
        return tx.update(params, tx.init(params), params, curvature=at, refresh=True)

    return run(params)


def products(**options):
    """Matrix products of a step that only preconditions."""
    params, _, _, layers = problem()
    tx = ko.kfac(layers, **COMMON, **options)
    state = jax.eval_shape(tx.init, params)
    step = jax.make_jaxpr(lambda p, s: tx.update(p, s, p, curvature=None, refresh=False))
    return sum(eqn.primitive.name == "dot_general" for eqn in h.equations(step(params, state)))


def test_each_layer_has_the_update_of_the_inverse_that_fits_its_width():
    got, state = update(ko.kfac)
    for name, inverse in (("wide", "cholesky"), ("narrow", "eigh")):
        expected, _ = update(ko.kfac, inverse=inverse)
        np.testing.assert_array_equal(got[name], expected[name])
    params, _, _, layers = problem()
    product = ko.inverse_product(layers, state, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), product, got)


def test_wide_layers_take_half_the_products():
    assert products(inverse="eigh") == 8
    assert products() == 6
    assert products(inverse="cholesky") == 4


def test_the_table_shows_the_choice():
    *_, layers = problem()
    lines = str(ko.coverage(layers)).splitlines()
    (wide,) = (line for line in lines if line.startswith("wide"))
    (narrow,) = (line for line in lines if line.startswith("narrow"))
    assert "kronecker (cholesky)" in wide
    assert "kronecker (eigh)" in narrow


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ((NARROW, NARROW), "eigh"),
        ((NARROW + 1, 2), "cholesky"),
        ((2, NARROW + 1), "cholesky"),
    ],
)
def test_the_bias_row_does_not_count(shape, word):
    inputs, outputs = shape
    layer = ko.testing.dense_layer(inputs, outputs, bias=True)
    assert ko.blocks_of(None)(layer).name == f"kronecker ({word})"


def test_embeddings_go_by_their_outputs():
    def table(words, width):
        return ko.ggn(lookup).layers(jnp.zeros((words, width)), jnp.zeros(4, jnp.int32))

    def lookup(params, tokens):
        return ko.Normal(ko.tap_embedding(params[tokens], tokens, params))

    def held(words, width):
        (layer,) = table(words, width)
        block = ko.blocks_of(None)(layer)
        fresh = jax.eval_shape(lambda: block.factorize(block.init(layer, float), jnp.ones(())))
        return type(fresh).__name__

    assert held(300, 4) == "TokenEigenInverse"
    assert held(4, NARROW + 1) == "TokenDenseInverse"


def _is_inverse(x):
    return isinstance(x, (EigenInverse, DenseInverse))


def test_what_samples_a_posterior_is_damped_exactly_at_any_width():
    params, _, _, layers = problem()
    tx = ko.noisy_kfac(layers, kl_clip=None)
    state = jax.jit(tx.init)(params)
    inverses = jax.tree.leaves(state, is_leaf=_is_inverse)
    assert [type(x) for x in inverses if _is_inverse(x)] == [EigenInverse, EigenInverse]
    drawn = ko.sample_params(layers, state, params, jax.random.key(0), size=10, weight_decay=0.1)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(drawn))


def test_a_state_with_the_other_inverse_is_named():
    params, _, _, layers = problem()
    state = jax.jit(ko.kfac(layers, inverse="eigh", **COMMON).init)(params)
    with pytest.raises(ValueError, match=r"block=blocks_of\(None, inverse='eigh'\)"):
        ko.inverse_product(layers, state, params)
    ko.inverse_product(layers, state, params, block=ko.blocks_of(None, inverse="eigh"))


@pytest.mark.parametrize("words", [dict(sharing="reduce"), dict(positions=2)])
def test_words_that_a_block_of_its_kind_does_not_read_are_refused(words):
    """Channels, and steps that correlate, are measured at every position."""
    dense = ko.testing.dense_layer(2, 3)
    linear = ko.kronecker(**words)
    for layer, word in (
        (dataclasses.replace(dense, kind="conv", channels=2), dict(convolution="sua")),
        (dataclasses.replace(dense, uses=3), dict(recurrence="option1")),
    ):
        block_of = ko.blocks_of(linear, **word)
        assert block_of(dense) is linear
        (name, value), (other, _) = [*word.items(), *words.items()]
        with pytest.raises(ValueError, match=f"{name}='{value}'.*every position.*{other}"):
            block_of(layer)
