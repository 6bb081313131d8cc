"""Layers whose rows all examples share: tables of positions, kernels applied to constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.engine.state import CurvatureState, the_state
from tests import helpers, oracles
from tests.helpers import dense


def with_table(rows, how="added"):
    """A table of positions, looked up once for all examples."""

    def predict(p, x):
        positions = ko.tap_embedding(p["table"][jnp.arange(rows)], jnp.arange(rows), p["table"])
        add = (lambda x: x + positions) if how == "added" else jax.vmap(lambda x: x + positions)
        return ko.Normal(dense(jnp.tanh(add(x)).sum(1), p["head"]))

    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "table": jax.random.normal(keys[0], (rows, 3)),
        "head": jax.random.normal(keys[1], (3, 2)),
    }
    return predict, params


@pytest.mark.parametrize("how", ["added", "vmap"])
@pytest.mark.parametrize("examples", [4, 5])  # as many examples as positions, and not
def test_a_table_of_positions_stays_out_of_the_coupling(how, examples):
    predict, params = with_table(4, how)
    x = jax.random.normal(jax.random.key(1), (examples, 4, 3))
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x)
    assert {layer.path: layer.coupled for layer in layers} == {"table": False, "head": True}
    table = str(ko.coverage(layers, coupling=ko.coarse_correction()))
    assert "no row per example: not in the coupling" in table and "random signs" in table
    assert "random signs" not in str(ko.fisher(predict).layers(params, x))
    tx = ko.kfac_two_level(layers, learning_rate=0.1, damping=0.1)
    updates, state = tx.update(params, tx.init(params), params, curvature=estimator.at(params, x))
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert the_state(state, CurvatureState, "test").coarse.coarse_sizes.shape == (1,)


def test_no_layer_left_for_the_coupling_raises():
    w, constant = jnp.ones((3, 2)), jnp.ones((4, 3))
    estimator = ko.ggn(lambda w, x: ko.Normal(x + dense(constant, w).mean(0)))
    layers = estimator.layers(w, jnp.ones((5, 2)))
    ko.kfac(layers, learning_rate=0.1)
    with pytest.raises(ValueError, match="no layer is left for the coupling"):
        ko.kfac_two_level(layers, learning_rate=0.1)


def test_an_unrolled_recurrence_from_a_constant_state_is_per_example():
    def predict(w, x):
        h = jnp.zeros((x.shape[0], 3))
        for t in range(2):
            h = jnp.tanh(dense(h, w) + x[:, t])
        return ko.Normal(h)

    (layer,) = ko.ggn(predict).layers(jnp.eye(3), jnp.ones((3, 2, 3)))
    assert layer.per_example and layer.uses == 2 and not layer.notes


def test_padding_of_an_unrolled_recurrence_counts_as_dropped(x64):
    def predict(p, x, weights):
        h = jnp.ones((x.shape[0], 3))
        for t in range(2):
            h = jnp.tanh(ko.tap_dense(h @ p["w"] + p["b"], h, p["w"], p["b"]) + x[:, t])
        return ko.Normal(h, weights=weights)

    params = {"w": oracles.normal(0, (3, 3)), "b": oracles.normal(1, (3,))}
    x = oracles.normal(2, (3, 2, 3))
    padded, weights = (
        jnp.concatenate([x, jnp.full((2, 2, 3), jnp.nan)]),
        jnp.array([1.0, 1, 1, 0, 0]),
    )
    estimator = ko.ggn(predict)
    plan = oracles.plan(estimator.layers(params, x, weights[:3]))
    want = estimator.at(params, x, weights[:3]).statistics(plan)
    got = estimator.at(params, padded, weights).statistics(plan)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, want)


@pytest.mark.parametrize("examples", [3, 16, 64])
@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
def test_a_kernel_on_a_constant_has_the_mean_of_the_examples_own_squares(x64, kind, examples):
    constant = oracles.normal(0, (1, 2))
    params, x = oracles.normal(1, (2, 3)), oracles.normal(2, (examples, 3))
    output = lambda w, x: jnp.sum(jnp.cosh(x) * jnp.tanh(dense(constant, w)), -1, keepdims=True)
    if kind == "ggn":
        estimator = ko.ggn(lambda w, x: ko.Normal(output(w, x)))
    else:
        estimator = ko.empirical_fisher(lambda w, x: output(w, x)[:, 0])
    plan = oracles.plan(estimator.layers(params, x))
    measure = jax.jit(
        lambda count: estimator.at(params, x).statistics(plan._replace(count=count))[0][0]
    )
    draws = 2000  # steps of the optimizer
    factors = jax.vmap(measure)(jnp.arange(draws))
    blocks = jax.vmap(jnp.kron)(factors.inputs[:, 0], factors.outputs[:, 0])
    rows = jax.vmap(lambda e: jax.grad(lambda w: output(w, e[None])[0, 0])(params).ravel())(x)
    exact = rows.T @ rows / examples
    error = blocks.std(0) / np.sqrt(draws)
    assert (np.abs(blocks.mean(0) - exact) <= 5 * error + 1e-12).all()
    # the square of the summed gradient would be far outside
    total = rows.sum(0)
    assert np.abs(jnp.outer(total, total) / examples - exact).max() > 5 * error.max()


def test_raise_names_parameters_that_are_measured_in_part():
    estimator = ko.ggn(lambda p, x: ko.Normal(dense(x, p["w"]) + p["w"].sum()))
    layers = estimator.layers({"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    assert [u.path for u in layers.layers[0].partly] == ["w"]
    with pytest.raises(
        ValueError, match=r"only a part of the uses of\n  w \(3, 2\): w also used by reduce_sum"
    ):
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")


def test_the_table_says_what_a_parameter_without_block_gets():
    estimator = ko.ggn(lambda p, x: ko.Normal(dense(x, p["w"]) * helpers.computed(p["scale"])))
    params = {"w": jnp.ones((3, 2)), "scale": jnp.ones(2), "idle": jnp.ones(5)}
    layers = estimator.layers(params, jnp.ones((4, 3)))
    lines = str(ko.coverage(layers, uncovered="pass")).splitlines()
    of = {line.split()[0]: line for line in lines if line}
    assert "gradient passed on" in of["scale"] and "no gradient" in of["idle"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_without_weight_is_left_out(shared):
    w, x, targets = (
        jnp.ones((3, 2)),
        jax.random.normal(jax.random.key(0), (4, 3)),
        jnp.zeros((4, 2)),
    )
    estimator = ko.ggn(lambda w, x, weights: ko.Normal(dense(x, w), weights=weights))
    step = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
    tx = ko.kfac_two_level(estimator.layers(w, x, jnp.ones(4)), learning_rate=0.1, damping=0.1)

    @jax.jit
    def update(state, weights):
        curvature = estimator.at(w, x, weights)
        if shared:
            _, _, curvature = step(w, x, weights, targets=targets)
        return the_state(tx.update(w, state, w, curvature=curvature)[1], CurvatureState, "test")

    state = tx.update(w, tx.init(w), w, curvature=estimator.at(w, x, jnp.ones(4)))[1]
    before = the_state(state, CurvatureState, "test")
    after = update(state, jnp.zeros(4))
    assert (
        int(before.curvature_count) == int(after.curvature_count) == 1
        and int(after.skipped_statistics) == 0
    )
    jax.tree.map(np.testing.assert_array_equal, after.factors, before.factors)
    jax.tree.map(
        np.testing.assert_array_equal, after.coarse.coarse_factors, before.coarse.coarse_factors
    )


@pytest.mark.parametrize("examples", [2, 5])  # as many examples as shared rows, and not
def test_weights_of_examples_reach_shared_rows_through_the_gradients(x64, examples):
    constant, x = oracles.normal(0, (2, 3)), oracles.normal(2, (examples, 2))
    weights = jnp.arange(1.0, examples + 1)
    predict = lambda w, x, weights: ko.Normal(x * dense(constant, w).sum(0), weights=weights)
    estimator, params = ko.ggn(predict), oracles.normal(1, (3, 2))
    plan = oracles.plan(estimator.layers(params, x, weights))
    measure = lambda weights: estimator.at(params, x, weights).statistics(plan)[0][0]
    np.testing.assert_allclose(
        measure(weights).inputs, measure(jnp.ones(examples)).inputs, rtol=1e-12
    )
    nothing = measure(jnp.zeros(examples))
    assert not nothing.inputs.any() and not nothing.outputs.any()


@pytest.mark.parametrize("key", [(), (jax.random.key(0),)])
def test_a_model_that_closes_over_its_batch_has_rows_of_examples(x64, key):
    x, params = oracles.normal(0, (3, 4)), oracles.normal(1, (4, 2))
    weights = jnp.array([2.0, 0.0, 1.0])
    closed = ko.ggn(lambda w, *_: ko.Normal(dense(x, w), weights=weights))
    given = ko.ggn(lambda w, x, weights: ko.Normal(dense(x, w), weights=weights))
    layers = closed.layers(params, *key)
    assert layers.layers[0].coupled and "random signs" not in str(ko.coverage(layers))
    plan = oracles.plan(layers, coupling=ko.coarse_correction())
    got = closed.at(params, *key).statistics(plan)
    want = given.at(params, x, weights).statistics(plan)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want)
