"""Statistics and products over microbatches are those of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import microbatching

import kfac_optax as ko
from tests import helpers as h

N, SIZE = 12, 3
# a microbatch of padding only, and weights whose means differ between microbatches
WEIGHTS = jnp.array([0, 1, 2, 1, 0, 0.5, 1, 3, 0, 1, 0, 1.0])


def predict(params, x, weights=None):
    x = jnp.tanh(h.dense(x, params["first"]["w"], params["first"]["b"]))
    return ko.Categorical(h.dense(x, params["last"]["w"], params["last"]["b"]), weights=weights)


def losses(params, x, y):
    return predict(params, x).nll(y)


@pytest.fixture
def batch(x64):
    """Parameters, inputs and labels in double precision."""
    params = jax.tree.map(lambda p: p.astype(jnp.float64), h.plain_params())
    return params, jax.random.normal(jax.random.key(1), (N, 4)), jnp.arange(N) % h.CLASSES


def same(a, b):
    h.assert_close(a, b, rtol=1e-10, atol=1e-13)


METHODS = {
    "kfac_two_level": functools.partial(ko.kfac_two_level, learning_rate=0.1),
    "ekfac": functools.partial(ko.ekfac, learning_rate=0.1),
    "skfac": functools.partial(ko.skfac, rows=h.CLASSES * N),  # keeps the rows of the batch
    "singd": functools.partial(ko.singd, structure="block", size=2),  # news that are means
}


@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_that_of_the_whole_batch(batch, name):
    params, x, _ = batch
    estimator = ko.ggn(predict)
    tx = METHODS[name](estimator.layers(params, x, WEIGHTS), damping=0.05)

    @functools.partial(jax.jit, static_argnums=1)
    def update(params, size):
        curvature = estimator.at(params, x, WEIGHTS, microbatch_size=size)
        updates, state = tx.update(params, tx.init(params), params, curvature=curvature)
        return updates, optax.tree.get(state, "factors")

    (updates, factors), (expected, of_all) = update(params, SIZE), update(params, None)
    same(updates, expected)
    same(factors, of_all)


def test_first_moments_are_those_of_the_whole_batch(batch):
    params, x, y = batch
    estimator = ko.empirical_fisher(losses)
    tx = ko.eva(estimator.layers(params, x, y), learning_rate=0.1)

    @functools.partial(jax.jit, static_argnums=1)
    def update(params, size):
        curvature = estimator.at(params, x, y, microbatch_size=size)
        return tx.update(params, tx.init(params), params, curvature=curvature)

    same(update(params, SIZE), update(params, None))


def test_products_are_those_of_the_whole_batch(batch):
    params, x, _ = batch
    parts = ko.ggn(predict).at(params, x, WEIGHTS, microbatch_size=SIZE)
    whole = ko.ggn(predict).at(params, x, WEIGHTS)
    same(parts.vector_product(params), whole.vector_product(params))
    directions = [params, jax.tree.map(jnp.ones_like, params)]
    same(parts.quadratic_form(directions), whole.quadratic_form(directions))


def test_heads_with_weights_of_their_own(batch):
    """Each head is divided by its own mean weight, that of all microbatches."""
    params, x, _ = batch

    def heads(params, x, weights):
        logits = predict(params, x).logits
        return ko.Categorical(logits, weights=weights), ko.Normal(logits, weights=x[:, 0] ** 2)

    parts = ko.ggn(heads).at(params, x, WEIGHTS, microbatch_size=SIZE)
    same(parts.vector_product(params), ko.ggn(heads).at(params, x, WEIGHTS).vector_product(params))


def test_random_labels_differ_between_microbatches():
    """The same example in every microbatch: were the labels the same, more draws would be no help."""
    params = h.plain_params()
    x = jnp.ones((256, 4))
    estimator = ko.fisher(predict)
    at = functools.partial(estimator.at, params, key=jax.random.key(3))
    layers = estimator.layers(params, x)
    tx = ko.kfac(layers, learning_rate=0.1, bound="damped")

    @jax.jit
    def outputs(curvature):
        _, state = tx.update(params, tx.init(params), params, curvature=curvature)
        (factors,) = optax.tree.get(state, "factors").values()
        return factors.outputs

    drawn, repeated = outputs(at(x, microbatch_size=16)), outputs(at(x[:16]))
    exact = outputs(ko.ggn(predict).at(params, x))
    assert np.linalg.norm(drawn - exact) < np.linalg.norm(repeated - exact)
    assert np.linalg.norm(drawn - exact) < 0.2 * np.linalg.norm(exact)


def test_the_gradient_and_the_curvature_of_a_scanned_step(batch):
    """A step over microbatches, with the gradient from `optax.microbatching`, is that of the whole
    batch; so is one of `optax.MultiSteps`, given the curvature with the last mini-step.
    """
    params, x, y = batch
    estimator = ko.ggn(predict)
    tx = ko.kfac(estimator.layers(params, x), learning_rate=0.1, damping=0.05, bound="damped")
    loss = lambda params, x, y: predict(params, x).mean_nll(y)
    mean = microbatching.AccumulationType.MEAN
    in_parts = microbatching.microbatch(
        jax.grad(loss), argnums=(1, 2), microbatch_size=SIZE, accumulator=mean
    )

    @jax.jit
    def whole(params, state):
        grads = jax.grad(loss)(params, x, y)
        return tx.update(grads, state, params, curvature=estimator.at(params, x))

    @jax.jit
    def parts(params, state):
        curvature = estimator.at(params, x, microbatch_size=SIZE)
        return tx.update(in_parts(params, x, y), state, params, curvature=curvature)

    expected, after = whole(params, tx.init(params))
    same(parts(params, tx.init(params)), (expected, after))

    many = optax.MultiSteps(tx, every_k_schedule=N // SIZE)
    step = jax.jit(many.update)
    state = many.init(params)
    xs, ys = x.reshape(-1, SIZE, 4), y.reshape(-1, SIZE)
    for i in range(N // SIZE):
        last = i == N // SIZE - 1
        curvature = estimator.at(params, x, microbatch_size=SIZE) if last else None
        grads = jax.grad(loss)(params, xs[i], ys[i])
        updates, state = step(grads, state, params, curvature=curvature)
    # MultiSteps averages gradients with a share in single precision
    h.assert_close(updates, expected, rtol=1e-5, atol=1e-7)
    same(state.inner_opt_state.preconditioner.factors, after.preconditioner.factors)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "microbatch_size=0; expected a whole number"),
        (2.0, "microbatch_size=2.0; expected a whole number"),
        (True, "microbatch_size=True; expected a whole number"),
    ],
)
def test_a_size_that_is_no_number_of_examples(size, message):
    with pytest.raises(ValueError, match=message):
        ko.ggn(predict).at(h.plain_params(), jnp.ones((N, 4)), microbatch_size=size)


def test_a_batch_that_cannot_be_divided():
    params, x = h.plain_params(), jnp.ones((N, 4))
    with pytest.raises(ValueError, match="microbatch_size=5 of a batch of 12 examples; expected a"):
        ko.ggn(predict).at(params, x, microbatch_size=5).vector_product(params)
    fixed = ko.ggn(lambda params, x: predict(params, jnp.concatenate([x, jnp.ones((1, 4))])))
    with pytest.raises(ValueError, match=r"microbatch_size=1 of a batch of 13 examples"):
        fixed.at(params, x, microbatch_size=1).vector_product(params)
    two = ko.ggn(lambda params, x: (predict(params, x), predict(params, x[:2])))
    with pytest.raises(ValueError, match=r"heads of the prediction of a microbatch have \[3, 2\]"):
        two.at(params, x, microbatch_size=SIZE).vector_product(params)
    centred = ko.ggn(lambda params, x: ko.LogAmplitude(predict(params, x).logits[:, 0]))
    with pytest.raises(ValueError, match="scores about their mean over the batch"):
        centred.at(params, x, microbatch_size=SIZE).vector_product(params)


def test_devices_are_asked_once_for_the_means_of_all_microbatches():
    """As often as for a whole batch, and never within the loop over microbatches but for weights."""
    params, x = h.plain_params(), jnp.ones((N, 4))
    estimator = ko.ggn(predict)
    tx = ko.kfac(estimator.layers(params, x), learning_rate=0.1, axis_name="data", bound="damped")
    state = tx.init(params)

    def sums(size):
        def update(x):
            curvature = estimator.at(params, x, microbatch_size=size)
            return tx.update(params, state, params, curvature=curvature, refresh=False)

        program = jax.make_jaxpr(update, axis_env=[("data", 2)])(x)
        names = [e.primitive.name for e in h.equations(program.jaxpr)]
        loops = [e for e in h.equations(program.jaxpr) if e.primitive.name == "scan"]
        inside = [
            e.primitive.name for loop in loops for e in h.equations(loop.params["jaxpr"].jaxpr)
        ]
        return [sum(x.startswith("psum") for x in found) for found in (names, inside)]

    whole, in_loop = sums(None)
    assert whole > 0
    assert sums(SIZE) == [whole, in_loop] == [whole, 0]
