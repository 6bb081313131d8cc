"""MKOR as a transformation: its norm, its layers, and the switch of the hybrid."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests import oracles

X, Y = oracles.normal(0, (6, 3)), oracles.normal(1, (6, 2))


def losses(params, x, y):
    return jnp.sum(jnp.square(oracles.forward(params, x)[0] - y), 1)


ESTIMATOR = ko.empirical_fisher(losses)


def value(params):
    return losses(params, X, Y).mean()


class Taken(NamedTuple):
    """One step: its update, the gradient it was made of, and what came after."""

    updates: Any
    gradient: Any
    params: Any
    state: Any


def steps(make, count):
    """Some steps of a small regression, the curvature of the data's own losses at hand."""
    params = oracles.make_params(0, (3, 4, 2))
    tx = make(ESTIMATOR.layers(params, X, Y))

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(value)(params)
        curvature = ESTIMATOR.at(params, X, Y)
        updates, state = tx.update(gradient, state, params, curvature=curvature, value=loss)
        return Taken(updates, gradient, optax.apply_updates(params, updates), state)

    state, out = jax.jit(tx.init)(params), []
    for _ in range(count):
        out.append(step(params, state))
        params, state = out[-1].params, out[-1].state
    return out


def test_an_update_is_the_sandwich_with_the_norm_of_the_gradient(x64):
    (taken,) = steps(lambda layers: ko.mkor(layers, decay=0.75, threshold=None), 1)
    params = oracles.make_params(0, (3, 4, 2))
    of_outputs = 2 * (oracles.forward(params, X, tapped=False)[0] - Y)
    a, g = oracles.per_example(params, X.astype(float), of_outputs[None])
    for name, ai, gi in zip(params, a, g, strict=True):
        left, right = (
            np.linalg.inv(0.75 * np.eye(len(m)) + 0.25 * np.outer(m, m))
            for m in (ai.mean(0), gi[0].mean(0))
        )
        v, got = (
            np.vstack([t[name]["kernel"], t[name]["bias"]]) for t in (taken.gradient, taken.updates)
        )
        want = left @ v @ right
        np.testing.assert_allclose(got, want * np.linalg.norm(v) / np.linalg.norm(want), rtol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(got), np.linalg.norm(v), rtol=1e-12)


def test_no_gradient_no_update():
    params = oracles.make_params(0, (3, 4, 2))
    tx = ko.mkor(ESTIMATOR.layers(params, X, Y))
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda p: tx.update(zeros, tx.init(p), p, curvature=ESTIMATOR.at(p, X, Y))[0])
    h.assert_equal(update(params), zeros)


def test_it_trains():
    chain = lambda layers: optax.chain(ko.mkor(layers, curvature_every=1), optax.sgd(0.1, 0.9))
    run = steps(chain, 25)
    assert value(run[-1].params) < 0.3 * value(oracles.make_params(0, (3, 4, 2)))


def test_after_the_switch_it_is_the_method_that_follows():
    """A threshold that is met at once: from then on every bit is that of SGD alone."""
    behind = optax.sgd(0.05, 0.9)
    run = steps(
        lambda layers: optax.chain(
            ko.mkor_h(layers, least_decrease=jnp.inf, patience=1), optax.sgd(0.05, 0.9)
        ),
        4,
    )
    assert [bool(taken.state[0].stalled) for taken in run] == [False, True, True, True]
    step = jax.jit(lambda p, s: behind.update(jax.grad(value)(p), s, p))
    params, state = run[0].params, run[0].state[1]
    for taken in run[1:]:
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        h.assert_equal((taken.updates, taken.params), (updates, params))


def test_the_switch_follows_the_average_decrease_and_is_for_good():
    tx = ko.until_stalled(optax.scale(2.0), threshold=0.5, decay=0.5, patience=2)
    g = jnp.ones(1)
    state, out, average = tx.init(g), [], []
    # a loss that is no number counts as none
    for loss in (4.0, 3.0, jnp.nan, 2.0, 1.9, 1.9, 0.0, -9.0):
        u, state = jax.jit(tx.update)(g, state, value=jnp.asarray(loss))
        out.append(float(u[0]))
        average.append(float(state.decrease))
    np.testing.assert_allclose(average[:6], [0, 1, 1, 1, 0.55, 0.275], rtol=1e-6)
    assert out == [2, 2, 2, 2, 2, 1, 1, 1]
    u, _ = tx.update(g.at[0].set(jnp.nan), state, value=1.0)
    assert u[0] == 0


def test_layers_it_cannot_take_are_left_over_by_name():
    table = {"table": jnp.ones((5, 3)), "w": jnp.ones((3, 2)), "s": jnp.ones(2)}
    tokens = jnp.zeros((4,), int)

    def losses(params, tokens):
        x = ko.tap_embedding(params["table"][tokens], tokens, params["table"])
        x = ko.tap_dense(x @ params["w"], x, params["w"])
        return ko.tap_scale_shift(params["s"] * x, x, params["s"]).sum(1)

    layers = ko.empirical_fisher(losses).layers(table, tokens)
    with pytest.raises(ValueError, match="no inverse factors of rank-one updates") as error:
        ko.mkor(layers, uncovered="raise")
    assert "embedding" in str(error.value) and "scale_shift" in str(error.value)
    state = ko.mkor(layers).init(table)
    assert list(state.preconditioner.factors) == ["dense_3x2"]


def test_inverses_in_half_precision_are_kept_as_such():
    params = oracles.make_params(0, (3, 4, 2))
    tx = ko.mkor(ESTIMATOR.layers(params, X, Y), inverse_dtype=jnp.bfloat16)
    state = jax.eval_shape(tx.init, params).preconditioner
    assert {x.dtype for x in jax.tree.leaves(state.inverses)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.factors)} == {jnp.dtype(jnp.float32)}


def test_diagnostics_of_what_has_no_matrix_for_a_factor():
    params = oracles.make_params(0, (3, 4, 2))
    state = ko.mkor(ESTIMATOR.layers(params, X, Y)).init(params)
    found = ko.diagnostics(state)
    assert "eigenvalue_min" not in found
    assert found["statistics"] == 0
    assert ko.problems(state) == []


def test_errors():
    params = oracles.make_params(0, (3, 4, 2))
    layers = ESTIMATOR.layers(params, X, Y)
    with pytest.raises(ValueError, match="'pass', 'graft', 'raise'"):
        ko.mkor(layers, uncovered="diagonal")
    with pytest.raises(ValueError, match="decay=0"):
        ko.mkor(layers, decay=0)
    with pytest.raises(ValueError, match="patience=0"):
        ko.mkor_h(layers, patience=0)
    tx = ko.until_stalled(optax.identity())
    with pytest.raises(ValueError, match="got no `value`"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
