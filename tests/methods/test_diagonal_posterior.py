"""Vadam and VOGN: Adam without noise, and the posterior of a Bayesian linear regression."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._tree import named_leaves
from tests.methods import gradient_cases as c

GRADIENTS = np.random.default_rng(0).normal(size=(6, 3))


def test_vadam_without_draws_is_adam(x64):
    """At the prior's mean, where the L2 term has no gradient, with the prior for an epsilon."""
    w, at_zero = 1e-2, jnp.zeros(3)
    tx, adam = ko.vadam(weight_decay=w), optax.scale_by_adam(eps=w)
    state, other = tx.init(at_zero), adam.init(at_zero)
    ours, theirs = jax.jit(tx.update), jax.jit(adam.update)
    for g in GRADIENTS:
        got, state = ours(jnp.asarray(g), state, at_zero)
        expected, other = theirs(jnp.asarray(g), other)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_the_prior_draws_the_gradient_but_not_its_square(x64):
    w, params = 0.3, jnp.array([1.0, -2.0, 0.5])
    updates, _ = c.run(ko.vadam(weight_decay=w, damping=0.1), list(GRADIENTS), params)
    m, s = np.zeros(3), np.zeros(3)
    for t, (g, got) in enumerate(zip(GRADIENTS, updates, strict=True), start=1):
        m, s = 0.9 * m + 0.1 * (g + w * params), 0.999 * s + 0.001 * g**2
        divisor = np.sqrt(s / (1 - 0.999**t)) + w + 0.1
        np.testing.assert_allclose(got, m / (1 - 0.9**t) / divisor, rtol=1e-10)


@functools.cache
def regression():
    """Noise variance one, so that the mean negative log-likelihood is `|x w - y|^2 / 2`."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 3)) * np.array([1.0, 0.5, 2.0])
    return x, x @ np.array([1.0, -1.0, 0.5]) + rng.normal(size=64)


def example_gradients(w, x, y):
    return x * (x @ w - y)[:, None]


def follow(tx, steps, rate, squares=None):
    """Steps from the gradient at the mean itself: without noise, so that they come to rest."""
    x, y = (jnp.asarray(v) for v in regression())

    def step(carry, _):
        w, state = carry
        rows = example_gradients(w, x, y)
        given = rows if squares is None else squares(w)
        update, state = tx.update(rows.mean(0), state, w, per_example_grads=given)
        return (w - rate * update, state), None

    start = jnp.zeros(3, x.dtype)
    return jax.lax.scan(step, (start, tx.init(start)), length=steps)[0]


def test_vogn_comes_to_rest_at_the_posterior(x64):
    """Mean of the exact posterior, and of its precision the diagonal, where the squares are those
    of the model: `x_b` times noise of variance one.
    """
    x, y = regression()
    size, delta = len(x), 2.0
    w = delta / size
    tx = ko.vogn(weight_decay=w, b1=0.5)
    # rows x_b e_b with e_b of variance one: sqrt of 2 and zero, each for half of the draws, say
    of_model = jnp.concatenate([jnp.sqrt(2.0) * jnp.asarray(x), jnp.zeros_like(jnp.asarray(x))])
    mean, state = follow(tx, 2000, 0.5, lambda w: of_model)
    precision = x.T @ x + delta * np.eye(3)
    np.testing.assert_allclose(mean, np.linalg.solve(precision, x.T @ y), rtol=1e-8)
    variances = 1 / (size * (state.held.squares + w))
    np.testing.assert_allclose(variances, 1 / np.diag(precision), rtol=1e-8)


def test_vogn_squares_examples_not_their_mean(x64):
    """Of 64 examples the mean of squares is far larger than the square of the mean."""
    x, y = regression()
    rows = example_gradients(np.zeros(3), x, y)
    tx, w = ko.vogn(weight_decay=1e-3), jnp.zeros(3)
    update, state = tx.update(jnp.asarray(rows.mean(0)), tx.init(w), w, per_example_grads=rows)
    np.testing.assert_allclose(state.held.squares, (rows**2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(update, rows.mean(0) / ((rows**2).mean(0) + 1e-3), rtol=1e-12)


def net(params, x):
    """Tokens, a convolution, a norm's scale and shift, and a dense layer on what is left."""
    table = params["table"]
    x = ko.tap_embedding(table[x], x, table)
    y = jax.lax.conv_general_dilated(
        x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    y = jnp.tanh(ko.tap_conv(y, x, params["conv"], strides=(1,), padding="SAME"))
    z = y * params["scale"] + params["shift"]
    z = ko.tap_scale_shift(z, y, params["scale"], params["shift"])
    s = z @ params["w"] + params["b"]
    return ko.tap_dense(s, z, params["w"], params["b"]).mean(1)


def test_squares_from_rows_are_those_of_the_examples(x64):
    """Of every kind of layer, positions of an example added up before squaring."""
    rng = np.random.default_rng(2)
    shapes = dict(table=(5, 2), conv=(3, 2, 2), scale=(2,), shift=(2,), w=(2, 3), b=(3,))
    params = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    x, y = jnp.asarray(rng.integers(0, 4, size=(4, 6))), jnp.arange(4) % 3

    def losses(params, x, y):
        return ko.Categorical(net(params, x)).nll(y)

    def loss(params, x, y):
        return losses(params, x[None], y[None])[0]

    estimator = ko.empirical_fisher(losses)
    layers = estimator.layers(params, x, y)
    rows = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(params, x, y)
    gradient = jax.tree.map(lambda r: jnp.asarray(np.asarray(r).mean(0)), rows)
    plain, by_rows = ko.vogn(), ko.vogn(layers)
    start = plain.init(params)
    expected, _ = jax.jit(plain.update)(gradient, start, params, per_example_grads=rows)
    curvature = estimator.at(params, x, y)
    got, state = jax.jit(by_rows.update)(gradient, start, params, curvature=curvature)
    for name, squares in named_leaves(state.held.squares).items():
        by_hand = np.square(np.asarray(rows[name])).mean(0)
        np.testing.assert_allclose(squares, by_hand, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-9)


def test_the_diagonal_of_ggn_rows_is_that_of_the_matrix(x64):
    """All columns of the output Fisher: the diagonal of the Gauss-Newton matrix."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2)))
    w = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3)))
    estimator = ko.ggn(lambda w, x: ko.Categorical(ko.tap_dense(x @ w, x, w)))
    tx = ko.vogn(estimator.layers(w, x))
    _, state = jax.jit(tx.update)(w, tx.init(w), w, curvature=estimator.at(w, x))
    p = jax.nn.softmax(x @ w)
    np.testing.assert_allclose(state.held.squares, (x**2).T @ (p * (1 - p)) / 4, rtol=1e-10)


def test_draws_have_the_mean_and_the_variances():
    w, size, t = 0.1, 50, 0.5
    params = {"a": jnp.ones((2, 2)), "b": jnp.array([3.0])}
    tx = optax.chain(ko.vadam(weight_decay=w), optax.scale_by_learning_rate(0.1))
    state = tx.init(params)

    def draw(key, state):
        return ko.sample_diagonal(state, params, key, size=size, weight_decay=w, temperature=t)

    first = jax.jit(draw)(jax.random.key(0), state)  # nothing is known yet
    np.testing.assert_array_equal(first["a"], params["a"])
    gradient = {"a": jnp.array([[1.0, 2.0], [0.0, 3.0]]), "b": jnp.array([0.5])}
    _, state = jax.jit(tx.update)(gradient, state, params)
    many = jax.jit(jax.vmap(draw, in_axes=(0, None)))
    draws = jax.device_get(many(jax.random.split(jax.random.key(1), 4000), state))
    gradient = jax.device_get(gradient)
    for name, g in gradient.items():
        variance = t / size / (g**2 + w)
        error = np.sqrt(variance / 4000)
        assert (np.abs(draws[name].mean(0) - params[name]) < 3.5 * error).all()
        spread = variance * np.sqrt(2 / 4000)
        assert (np.abs(draws[name].var(0) - variance) < 3.5 * spread).all()


def test_what_the_optimizer_does_not_see_is_not_drawn():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.masked(ko.vadam(weight_decay=0.1), {"a": True, "b": False})
    _, state = tx.update(params, tx.init(params), params)
    drawn = ko.sample_diagonal(state, params, jax.random.key(0), size=1, weight_decay=0.1)
    assert (drawn["a"] != 1).all()
    np.testing.assert_array_equal(drawn["b"], params["b"])
    with pytest.raises(ValueError, match="sample_diagonal: found 0 DiagonalPosterior"):
        ko.sample_diagonal((), params, jax.random.key(0), size=1, weight_decay=0.1)
    with pytest.raises(ValueError, match="sample_diagonal: weight_decay=0"):
        ko.sample_diagonal(state, params, jax.random.key(0), size=1, weight_decay=0)


def test_vogn_says_what_it_needs():
    w, g = jnp.ones(2), jnp.ones((3, 2))
    tx = ko.vogn()
    with pytest.raises(ValueError, match="got no `per_example_grads`"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match=r"shapes \[\(2,\)\]; expected a tree like the gradient"):
        tx.update(w, tx.init(w), w, per_example_grads=w)
    with pytest.raises(ValueError, match="vogn.update got no params"):
        tx.update(w, tx.init(w), per_example_grads=g)


def test_bad_squares_change_nothing():
    w, g = jnp.ones(2), jnp.ones((3, 2))
    tx = ko.vogn()
    _, good = tx.update(g.mean(0), tx.init(w), w, per_example_grads=g)
    update, state = tx.update(g.mean(0), good, w, per_example_grads=g.at[0, 0].set(jnp.nan))
    np.testing.assert_array_equal(update, jnp.zeros(2))
    jax.tree.map(np.testing.assert_array_equal, state.held, good.held)
    assert int(state.counts.skipped_statistics) == 1


def test_squares_of_two_devices_are_averaged(x64):
    """A mapped axis over halves of the batch: the same squares as of all of it."""
    rows = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)))
    w, gradient = jnp.ones(3), rows.mean(0)
    plain, mapped = ko.vogn(), ko.vogn(axis_name="batch")
    expected, _ = jax.jit(plain.update)(gradient, plain.init(w), w, per_example_grads=rows)

    def on_device(rows):
        return mapped.update(gradient, mapped.init(w), w, per_example_grads=rows)[0]

    got = jax.jit(jax.vmap(on_device, axis_name="batch"))(rows.reshape(2, 3, 3))
    np.testing.assert_allclose(got, jnp.stack([expected, expected]), rtol=1e-12)
