"""Tensor-normal training against the covariance it assumes, dense Fisher matrices and K-FAC."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests.methods import gradient_cases as c


def spd(seed, n):
    m = c.draws(seed, n, n + 2, steps=1)[0]
    return m @ m.T / n


def updated(tx, gradient, sampled):
    gradient = jax.tree.map(jnp.asarray, gradient)
    return jax.jit(tx.update)(
        gradient, tx.init(gradient), sampled_grads=jax.tree.map(jnp.asarray, sampled)
    )


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_covariance_of_a_tensor_normal_is_exact(x64, shape):
    """Samples whose mean product is `O_1 (x) ... (x) O_k`: the update is its inverse."""
    covariance = functools.reduce(np.kron, [spd(i, n) for i, n in enumerate(shape)])
    size = len(covariance)
    sampled = np.sqrt(size) * np.linalg.cholesky(covariance).T.reshape(size, *shape)
    g = c.draws(9, *shape, steps=1)[0]
    tx = ko.scale_by_tnt(damping=1e-10 ** len(shape), merge=1)  # 1e-10 on every axis
    update, state = updated(tx, g, sampled)
    expected = np.linalg.solve(covariance, g.ravel())
    np.testing.assert_allclose(np.ravel(update), expected, rtol=1e-4)
    traces = [np.trace(f[0]) for f in state.factors["x".join(map(str, shape))].values()]
    np.testing.assert_allclose(traces, np.trace(covariance), rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_dense_kronecker_product_of_inverses(x64, shape):
    damping, sampled = 0.3, c.draws(0, *shape, steps=6)
    g = c.draws(1, *shape, steps=1)[0]
    update, _ = updated(ko.scale_by_tnt(damping=damping, merge=1), g, sampled)
    k, mean = len(shape), np.prod(shape) ** (1 / len(shape))
    dense = np.ones((1, 1))
    for axis, n in enumerate(shape):
        unfolded = np.moveaxis(sampled, axis + 1, 1).reshape(len(sampled), n, -1)
        factor = np.einsum("bij,bkj->ik", unfolded, unfolded) / len(sampled)
        normal = factor / np.trace(factor) ** ((k - 1) / k)
        dense = np.kron(dense, normal + damping ** (1 / k) * mean / n * np.eye(n))
    np.testing.assert_allclose(np.ravel(update), np.linalg.solve(dense, g.ravel()), rtol=1e-9)


def test_vector_is_a_damped_fisher_solve(x64):
    sampled, g = c.draws(2, 5, steps=8), c.draws(3, 5, steps=1)[0]
    update, _ = updated(ko.scale_by_tnt(damping=0.1), g, sampled)
    fisher = sampled.T @ sampled / 8 + 0.1 * np.eye(5)
    np.testing.assert_allclose(update, np.linalg.solve(fisher, g), rtol=1e-10)


def test_one_example_of_a_dense_layer_is_kfac(x64):
    """`A (x) G` with the damping that K-FAC's factors share by their traces."""
    a, b = c.draws(4, 4, steps=2)[0], c.draws(5, 3, steps=2)[0]
    left, right = np.outer(a, a), np.outer(b, b)
    g, damping = c.draws(6, 4, 3, steps=1)[0], 0.2
    update, _ = updated(ko.scale_by_tnt(damping=damping, merge=1), g, np.outer(a, b)[None])
    # factors of equal trace: pi = sqrt((tr A / 4) / (tr G / 3)) is sqrt(3 / 4)
    scale = np.sqrt(np.trace(right) / np.trace(left))
    left, right = left * scale, right / scale
    pi = np.sqrt((np.trace(left) / 4) / (np.trace(right) / 3))
    left = left + pi * np.sqrt(damping) * np.eye(4)
    right = right + np.sqrt(damping) / pi * np.eye(3)
    expected = np.linalg.solve(left, g) @ np.linalg.inv(right)
    np.testing.assert_allclose(update, expected, rtol=1e-9)


def test_mean_over_examples_counts_as_their_number(x64):
    """Scores of single examples are independent with mean zero: `N` times the mean's product."""
    g, mean = c.draws(7, 5, steps=2)
    update, _ = updated(ko.scale_by_tnt(damping=0.1, examples=20), g, mean)
    fisher = 20 * np.outer(mean, mean) + 0.1 * np.eye(5)
    np.testing.assert_allclose(update, np.linalg.solve(fisher, g), rtol=1e-9)


def test_diagonal_of_a_long_axis(x64):
    sampled, g = c.draws(8, 5, 2, steps=4), c.draws(9, 5, 2, steps=1)[0]
    tx = ko.scale_by_tnt(damping=0.1, max_dim=3, long_axes="diagonal", merge=1)
    update, _ = updated(tx, g, sampled)
    rows, right = np.mean(np.sum(sampled**2, 2), 0), np.einsum("bij,bik->jk", sampled, sampled) / 4
    s, mean = np.sum(rows), np.sqrt(10)
    left = 1 / (rows / np.sqrt(s) + np.sqrt(0.1) * mean / 5)
    inverse = np.linalg.inv(right / np.sqrt(s) + np.sqrt(0.1) * mean / 2 * np.eye(2))
    np.testing.assert_allclose(update, left[:, None] * g @ inverse, rtol=1e-9)


def test_sampled_gradients_that_are_not_finite_are_left_out():
    g = jnp.ones((2, 2))
    tx = ko.scale_by_tnt(inverse_every=1)
    first, _ = tx.update(g, tx.init(g), sampled_grads=jnp.full((1, 2, 2), jnp.nan))
    np.testing.assert_array_equal(first, g)
    _, before = tx.update(g, tx.init(g), sampled_grads=jnp.eye(2)[None])
    update, after = tx.update(g, before, sampled_grads=jnp.full((1, 2, 2), jnp.nan))
    np.testing.assert_array_equal(after.factors["2x2"]["0"], before.factors["2x2"]["0"])
    assert np.isfinite(update).all()
    assert int(after.counts.skipped_statistics) == 2


def test_it_trains_on_gradients_at_sampled_labels():
    x = jax.random.normal(jax.random.key(0), (32, 4)) * jnp.array([2.0, 1.0, 0.3, 0.1])
    y = jnp.argmax(x @ jax.random.normal(jax.random.key(1), (4, 3)), 1)

    def predict(w, x):
        return ko.Categorical(x @ w)

    fisher, tx = ko.fisher(predict), ko.tnt(0.3, damping=1e-2, examples=32)

    def step(carry, key):
        w, state = carry
        loss, g = jax.value_and_grad(lambda w: predict(w, x).mean_nll(y))(w)
        sampled = fisher.at(w, x, key=key).sampled_gradient()
        updates, state = tx.update(g, state, w, sampled_grads=sampled)
        return (w + updates, state), loss

    start = jnp.zeros((4, 3))
    losses = jax.lax.scan(step, (start, tx.init(start)), jax.random.split(jax.random.key(2), 40))[1]
    assert losses[-1] < 0.5 * losses[0]


G = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("examples", "sampled", "match"),
    [
        (4, None, "got no `sampled_grads`.*sampled_gradient\\(\\)"),
        (4, {"a": jnp.ones((2, 2))}, "no leaf 'b'"),
        (None, G, "'a' of sampled_grads has shape \\(2, 2\\).*examples="),
        (
            4,
            {"a": jnp.ones((5, 2, 2)), "b": jnp.ones(3)},
            "'a'.*\\(5, 2, 2\\); expected \\(2, 2\\)",
        ),
        (None, {"a": jnp.ones((5, 2, 2)), "b": jnp.ones((4, 3))}, "'a': 5, 'b': 4"),
    ],
)
def test_wrong_sampled_gradients(examples, sampled, match):
    tx = ko.scale_by_tnt(examples=examples)
    extra = {} if sampled is None else {"sampled_grads": sampled}
    with pytest.raises(ValueError, match=f"(?s){match}"):
        tx.update(G, tx.init(G), **extra)


@pytest.mark.parametrize(
    ("arguments", "match"), [({"damping": 0.0}, "damping"), ({"examples": 0}, "examples")]
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        ko.scale_by_tnt(**arguments)
