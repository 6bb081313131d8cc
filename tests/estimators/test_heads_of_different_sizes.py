"""Heads with batches of their own: every one is a mean over its own examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_optax as ko
from kfac_optax.capture.layers import RANDOM_SIGNS
from kfac_optax.estimators.curvature import trace_model
from kfac_optax.estimators.served_heads import served
from kfac_optax.experiments import jets
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")
SIZES = {"fewer first": (4, 7), "more first": (7, 4), "equal": (5, 5)}
SCALE = 0.5
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def points(sizes, d=2):
    """Of the boundary, which is the first head, and of the inside."""
    return tuple(oracles.normal(seed, (n, d)) for seed, n in enumerate(sizes))


def naturals(params, edge, inside):
    return jets.network(params, edge), jets.network_jet(params, inside).laplacian[:, 0]


def predict(params, edge, inside):
    value, residual = naturals(params, edge, inside)
    return {"boundary": ko.Normal(value), "interior": ko.Normal(residual, scale=SCALE)}


@every_size
def test_products_are_those_of_the_loss(sizes):
    """`J0^T J0 / N0 + J1^T J1 / (N1 scale^2)`, of residuals with Laplacians in them."""
    params = jets.init(jax.random.key(0), (2, 3, 1), jnp.float64)
    flat, unravel = ravel_pytree(params)
    batch, v = points(sizes), oracles.normal(5, flat.shape)

    @jax.jit
    def compute(flat, v):
        jacobians = jax.jacrev(lambda flat: naturals(unravel(flat), *batch))(flat)
        curvature = ko.ggn(predict).at(unravel(flat), *batch)
        product = curvature.vector_product(unravel(v))
        return jacobians, ravel_pytree(product)[0], curvature.quadratic_form([unravel(v)])

    jacobians, product, form = compute(flat, v)
    terms = zip(jacobians, sizes, (1, SCALE**2), strict=True)
    exact = sum(np.asarray(j).T @ np.asarray(j) / n / square for j, n, square in terms)
    np.testing.assert_allclose(product, exact @ v, rtol=1e-10)
    np.testing.assert_allclose(form[0, 0], v @ exact @ v, rtol=1e-10)


@every_size
def test_centred_heads_have_a_mean_of_their_own(sizes):
    """`4 Cov[O]` of every state over its own walkers, in products and in rows; and a gradient at
    drawn signs does not see the norms.
    """
    w, v, batch = oracles.normal(3, (3, 1)), oracles.normal(4, (3, 1)), points(sizes, 3)
    states = lambda w, *xs: [ko.LogAmplitude(jnp.tanh(x @ w)[:, 0]) for x in xs]
    scores = [x * (1 - jnp.tanh(x @ w) ** 2) for x in batch]
    exact = sum(4 * np.cov(o, rowvar=False, bias=True) for o in scores)

    @jax.jit
    def compute(w, v):
        curvature = ko.ggn(states).at(w, *batch)
        jacobian = curvature.linearize()
        square = jacobian.vjp(jacobian.jvp(v)) / jacobian.examples
        return curvature.vector_product(v), square

    for got in compute(w, v):
        np.testing.assert_allclose(got, exact @ v, rtol=1e-10)
    norms = lambda c, *xs: [ko.LogAmplitude(x[:, 0] + c) for x in xs]
    drawn = ko.fisher(norms).at(jnp.zeros(()), *batch, key=jax.random.key(0))
    np.testing.assert_allclose(jax.jit(drawn.sampled_gradient)(), 0, atol=1e-12)


def linear(w, edge, inside):
    """One layer, two uses of it, two outputs each."""
    value, residual = (ko.tap_dense(x @ w, x, w) for x in (edge, inside))
    return ko.Normal(value), ko.Normal(residual, scale=SCALE)


def moments(batch):
    return [np.asarray(x.T @ x) / len(x) for x in batch]


@every_size
@pytest.mark.parametrize("shared", [False, True], ids=["at", "value_and_grad"])
def test_factors_add_up_over_heads_as_if_all_had_as_many_examples(sizes, shared):
    w, batch = oracles.normal(3, (2, 2)), points(sizes)
    estimator = ko.ggn(linear)
    plan = oracles.plan(estimator.layers(w, *batch))

    @jax.jit
    def measure():
        if not shared:
            return estimator.at(w, *batch).statistics(plan)[0]
        loss = lambda heads, _: sum(jnp.mean(head.mean**2) for head in heads)
        return estimator.value_and_grad(loss)(w, *batch)[2].statistics(plan)[0]

    (factors,) = measure()
    np.testing.assert_allclose(factors.inputs[0], sum(moments(batch)), rtol=1e-10)
    mean = (1 + 1 / SCALE**2) / 2
    np.testing.assert_allclose(factors.outputs[0], mean * np.eye(2), rtol=1e-10, atol=1e-12)


@every_size
def test_inputs_alone_too(sizes):
    w, batch = oracles.normal(3, (2, 2)), points(sizes)
    estimator = ko.forward_only(linear)
    plan = oracles.plan(estimator.layers(w, *batch))
    (factors,), _ = jax.jit(lambda: estimator.at(w, *batch).statistics(plan))()
    np.testing.assert_allclose(factors.inputs[0], sum(moments(batch)), rtol=1e-10)
    np.testing.assert_allclose(factors.outputs[0], np.eye(2), rtol=1e-12)


def test_drawn_labels_have_the_same_mean():
    """One output, scores of standard normal labels: the mean of their squares is close to one."""
    w, batch = oracles.normal(3, (2, 1)), points((400, 100))
    estimator = ko.fisher(linear, samples=8)
    plan = oracles.plan(estimator.layers(w, *batch), block=ko.per_equation())
    key = jax.random.key(1)
    (factors,), _ = jax.jit(lambda: estimator.at(w, *batch, key=key).statistics(plan))()
    got = factors.outputs[0, :, 0, 0] / factors.share[0]
    np.testing.assert_allclose(got, [1, 1 / SCALE**2], rtol=0.15)
    np.testing.assert_allclose(factors.inputs[0], moments(batch), rtol=1e-10)


def test_rows_of_a_small_head_are_examples_of_it():
    """No random signs, which are for rows that examples share."""
    w = oracles.normal(3, (2, 2))
    (layer,) = ko.ggn(linear).layers(w, *points((7, 4)))
    assert RANDOM_SIGNS not in layer.notes
    table = lambda w, x, e: ko.Normal(x + ko.tap_dense(e @ w, e, w).sum(0))
    (layer,) = ko.ggn(table).layers(w, oracles.normal(0, (7, 2)), oracles.normal(1, (3, 2)))
    assert RANDOM_SIGNS in layer.notes


def test_a_block_that_sees_all_uses_at_once_needs_equal_batches():
    w, batch = oracles.normal(3, (2, 2)), points((7, 4))
    estimator = ko.ggn(linear)
    plan = oracles.plan(estimator.layers(w, *batch), block=ko.recurrent())
    with pytest.raises(ValueError, match=r"serve heads of \[4, 7\] examples"):
        jax.eval_shape(lambda: estimator.at(w, *batch).statistics(plan))


def heads_of_sites(function, *args):
    """What each tap serves, in order of execution."""
    w = oracles.normal(3, (2, 2))
    traced = trace_model(ko.ggn(function).spec, w, args)
    sizes = [len(head.mean) for head in jax.tree.leaves(traced.out_shape, is_leaf=is_normal)]
    return [(s.head, s.examples) for s in served(traced, [1] * len(sizes), sizes)]


def is_normal(x):
    return isinstance(x, ko.Normal)


def tapped(w, x):
    return ko.tap_dense(x @ w, x, w)


def scanned(w, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(tapped(w, x)), None), x, length=3)[0]


@pytest.mark.parametrize("run", [tapped, jax.jit(tapped), jax.checkpoint(tapped), scanned])
def test_the_head_of_a_use_is_found_by_data_flow(run):
    edge, inside = points((7, 4))
    apart = lambda w, x, y: (ko.Normal(run(w, x)), ko.Normal(run(w, y)))
    assert heads_of_sites(apart, edge, inside) == [(0, 7), (1, 4)]
    swapped = lambda w, x, y: (ko.Normal(run(w, y)), ko.Normal(run(w, x)))
    assert heads_of_sites(swapped, edge, inside) == [(0, 4), (1, 7)]


def test_both_heads_of_one_call_and_a_trunk():
    edge, inside = points((7, 4))

    @functools.partial(jax.jit, static_argnums=2)
    def both(w, x, cut):
        h = jnp.tanh(tapped(w, x))
        return tapped(w, h[:cut]), tapped(w, h)

    def predict(w, x, y):
        del y
        first, second = both(w, x, 3)
        return ko.Normal(first), ko.Normal(second)

    # the trunk has the rows of no head alone: it counts as the first
    assert heads_of_sites(predict, edge, inside) == [(None, 3), (0, 3), (1, 7)]


@pytest.mark.parametrize("make", [ko.kronecker, lambda **words: ko.split_kronecker(2, **words)])
def test_thinned_positions_have_unit_output_factors_too(make):
    """Of inputs alone: positions that are kept count for those left out."""
    w, x = oracles.normal(3, (2, 2)), oracles.normal(0, (3, 4, 2))
    estimator = ko.forward_only(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    plan = oracles.plan(estimator.layers(w, x), block=make(positions=2))
    (factors,), _ = jax.jit(lambda: estimator.at(w, x).statistics(plan))()
    np.testing.assert_allclose(jnp.squeeze(factors.outputs), np.eye(2), rtol=1e-12)
