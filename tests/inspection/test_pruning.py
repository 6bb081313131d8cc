"""Pruning scores and what the others do, against the dense inverse and by elimination."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko

LAM = 0.1
ROWS = np.random.default_rng(0).normal(size=(4, 5))
WEIGHTS = np.array([1.0, -0.2, 0.5, 2.0, -1.0])


def tree(vectors):
    vectors = jnp.asarray(vectors)
    return {"a": vectors[..., :4].reshape(*vectors.shape[:-1], 2, 2), "b": vectors[..., 4]}


def flat(params):
    return np.concatenate([np.ravel(params["a"]), np.ravel(params["b"])])


def fisher():
    return ROWS.T @ ROWS / len(ROWS) + LAM * np.eye(5)


def test_the_inverse_is_dense(x64):
    inverse, expected = ko.inverse_of_rows(jnp.asarray(ROWS), LAM), np.linalg.inv(fisher())
    np.testing.assert_allclose(
        inverse.product(jnp.asarray(WEIGHTS)), expected @ WEIGHTS, rtol=1e-10
    )
    np.testing.assert_allclose(inverse.diagonal(), np.diag(expected), rtol=1e-10)
    for i in range(5):
        np.testing.assert_allclose(inverse.column(i), expected[i], rtol=1e-9, atol=1e-12)


def test_scores_are_the_least_rise_of_the_model(x64):
    """Over all changes that make weight `i` zero, `delta^T F delta / 2` is least at the score."""
    scores = jax.jit(ko.pruning_scores)(tree(WEIGHTS), tree(ROWS), damping=LAM)
    for i, score in enumerate(flat(scores)):
        rest = np.delete(np.arange(5), i)
        f, own = fisher(), -WEIGHTS[i]
        others = -np.linalg.solve(f[np.ix_(rest, rest)], f[rest, i] * own)
        delta = np.insert(others, i, own)
        np.testing.assert_allclose(score, delta @ f @ delta / 2, rtol=1e-9)


def test_pruning_is_the_minimum_without_these_weights(x64):
    """Eliminated in the dense matrix: the remaining change solves its normal equations."""
    gone = np.array([True, False, True, False, True])
    f = fisher()
    others = -np.linalg.solve(f[np.ix_(~gone, ~gone)], f[np.ix_(~gone, gone)] @ -WEIGHTS[gone])
    expected = np.where(gone, 0, WEIGHTS)
    expected[~gone] += others
    remove = {"a": gone[:4].reshape(2, 2), "b": gone[4]}
    pruned = ko.prune(tree(WEIGHTS), tree(ROWS), remove, damping=LAM)
    np.testing.assert_allclose(flat(pruned), expected, rtol=1e-9)
    assert (flat(pruned)[gone] == 0).all()
    none = jax.tree.map(jnp.zeros_like, remove)
    np.testing.assert_array_equal(
        flat(ko.prune(tree(WEIGHTS), tree(ROWS), none, damping=LAM)), WEIGHTS
    )


def test_wrong_trees_raise():
    with pytest.raises(ValueError, match=r"pruning_scores: per_example_grads has the shapes"):
        ko.pruning_scores(tree(WEIGHTS), tree(WEIGHTS), damping=LAM)
    with pytest.raises(ValueError, match="prune: remove has 4 entries"):
        ko.prune(tree(WEIGHTS), tree(ROWS), jnp.ones(4), damping=LAM)
    with pytest.raises(ValueError, match="prune: damping=0"):
        ko.prune(tree(WEIGHTS), tree(ROWS), tree(WEIGHTS), damping=0)
