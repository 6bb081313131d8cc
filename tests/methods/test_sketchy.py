"""Sketches against the statistics they bound, and against Shampoo where nothing escapes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.linalg.frequent_directions import absorb_columns, no_sketch
from tests import helpers as h
from tests.methods import gradient_cases as c
from tests.methods.test_shampoo import root_of


def parts(sketch):
    """`U D U^T` and `rho` of the first copy."""
    vectors, values = (np.asarray(x[0]) for x in sketch.low)
    return (vectors * values) @ vectors.T, float(sketch.tail[0])


def averages(gradients, decay):
    """Statistics of both axes after every gradient."""
    left = right = 0.0
    for t, g in enumerate(gradients, start=1):
        e = min(1 - 1 / t, decay) if decay < 1 else 1.0
        new = 1 - e if decay < 1 else 1.0
        left, right = e * left + new * g @ g.T, e * right + new * g.T @ g
        yield left, right


@pytest.mark.parametrize("decay", [0.8, 1.0])
def test_sketches_bound_the_statistics_from_both_sides(x64, decay):
    gradients = c.draws(0, 7, 3, steps=8)
    tx = ko.scale_by_sketchy(rank=2, decay=decay, merge=1)
    state, step = tx.init(jnp.ones((7, 3))), jax.jit(tx.update)
    for g, exact in zip(gradients, averages(gradients, decay), strict=True):
        _, state = step(g, state)
        for axis, statistic in enumerate(exact):
            low, tail = parts(state.factors["7x3"][str(axis)])
            assert tail > 0
            assert np.linalg.eigvalsh(statistic - low)[0] >= -1e-10
            above = low + tail * np.eye(len(low)) - statistic
            assert np.linalg.eigvalsh(above)[0] >= -1e-10


@pytest.mark.parametrize("decay", [0.8, 1.0])
def test_trace_is_kept_in_the_ledger(x64, decay):
    """One new column a step: `tr C = sum_j D_j + (rank + 1) rho`, exactly."""
    gradients = c.draws(1, 6, steps=12)
    tx = ko.scale_by_sketchy(rank=3, decay=decay)
    state, step, exact = tx.init(jnp.ones(6)), jax.jit(tx.update), 0.0
    for t, g in enumerate(gradients, start=1):
        e = min(1 - 1 / t, decay) if decay < 1 else 1.0
        exact = e * exact + (1 - e if decay < 1 else 1.0) * g @ g
        _, state = step(g, state)
        sketch = state.factors["6"]["0"]
        ledger = np.sum(sketch.low.values) + 4 * sketch.tail[0]
        np.testing.assert_allclose(ledger, exact, rtol=1e-12)
    assert sketch.tail[0] > 0


def test_directions_for_all_axes_are_shampoo(x64):
    names = ("conv", "dense", "vector")
    trees = [c.tree_of_all_kinds(s, jnp.float64) for s in range(4)]
    gradients = [{n: tree[n] for n in names} for tree in trees]
    words = dict(decay=0.9, max_dim=6)
    mine, state = c.run(ko.scale_by_sketchy(rank=6, **words), gradients)
    expected, _ = c.run(ko.scale_by_shampoo(inverse_every=1, **words), gradients)
    h.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    assert all(float(np.max(x.tail)) == 0 for x in state.factors["3x4"].values())


def test_upper_bound_is_what_preconditions(x64):
    gradients = c.draws(2, 7, 5, steps=5)
    tx = ko.scale_by_sketchy(rank=2, ridge=1e-3, merge=1)
    updates, state = c.run(tx, gradients)
    roots = []
    for axis, n in enumerate((7, 5)):
        low, tail = parts(state.factors["7x5"][str(axis)])
        bound = low + tail * np.eye(n)
        roots.append(root_of(bound + 1e-3 * np.linalg.eigvalsh(bound)[-1] * np.eye(n), 4))
    expected = roots[0] @ gradients[-1] @ roots[1]
    np.testing.assert_allclose(updates[-1], expected, rtol=1e-9, atol=1e-11)


def test_a_direction_that_no_sketch_has_seen_is_not_blown_up(x64):
    """Roots of the ridge would make it `1e-6^(-1/4)` times as long on either side."""
    gradients = [np.diag([1.0, 0.0, 0.0]), np.diag([0.0, 1.0, 0.0])]
    words = dict(rank=1, merge=1, curvature_every=5)
    updates, _ = c.run(ko.scale_by_sketchy(decay=1.0, **words), gradients)
    # sums of both would have been diag(1, 1, 0) with roots of at most one; three is the rank
    assert np.linalg.norm(updates[1]) <= 3**0.5
    free, _ = c.run(ko.scale_by_sketchy(decay=1.0, root=4, **words), gradients)
    assert np.linalg.norm(free[1]) > 900


def test_vector_is_adagrad_of_its_sketch(x64):
    gradients = c.draws(3, 6, steps=9)
    updates, state = c.run(ko.scale_by_sketchy(rank=2, decay=1.0, ridge=0.0), gradients)
    low, tail = parts(state.factors["6"]["0"])
    expected = root_of(low + tail * np.eye(6), 2) @ gradients[-1]
    np.testing.assert_allclose(updates[-1], expected, rtol=1e-9)


def test_both_ways_of_taking_columns_in_agree(x64):
    """Few columns go through a QR factorisation; columns of zeros make them many."""
    few, many = no_sketch(8, 2), no_sketch(8, 2)
    for columns in c.draws(4, 8, 3):
        few = absorb_columns(few, columns, 0.9, 0.1)
        many = absorb_columns(many, np.pad(columns, ((0, 0), (0, 5))), 0.9, 0.1)
    dense = [(x.low.vectors * x.low.values) @ x.low.vectors.T for x in (few, many)]
    np.testing.assert_allclose(dense[0], dense[1], atol=1e-12)
    np.testing.assert_allclose(few.tail, many.tail, rtol=1e-12)


def test_long_axis_keeps_its_diagonal(x64):
    gradients = c.draws(5, 6, 3)
    words = dict(max_dim=4, long_axes="diagonal", decay=0.9)
    mine, _ = c.run(ko.scale_by_sketchy(rank=3, **words), gradients)
    expected, _ = c.run(ko.scale_by_shampoo(inverse_every=1, **words), gradients)
    np.testing.assert_allclose(mine, expected, rtol=1e-6)


def test_statistic_of_nothing_leaves_the_gradient():
    gradients = [np.zeros((2, 2), np.float32), np.eye(2, dtype=np.float32)]
    updates, state = c.run(ko.scale_by_sketchy(rank=1, decay=1.0, curvature_every=5), gradients)
    np.testing.assert_array_equal(updates[1], np.eye(2))
    assert ko.problems(state) == []


def test_it_trains_as_well_as_adam():
    tx = ko.sketchy(3e-2, rank=4, decay=0.95, graft="adam", momentum=None)
    assert c.final_loss(tx) < c.final_loss(optax.adam(3e-2))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": jnp.float32(3)}, TypeError, 'static_args=\\("rank",\\)'),
        ({"root": 1.5}, ValueError, "root"),
        ({"decay": -1.0}, ValueError, "decay"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        ko.scale_by_sketchy(**arguments)
