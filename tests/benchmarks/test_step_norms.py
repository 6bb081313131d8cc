"""Norms of the steps that an optimizer takes, as `benchmarks.step_norms` reports them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import step_norms
from tests import oracles
from tests.step_rules.test_bound import dense_fisher, gradient, problem


def test_the_norm_is_that_of_the_whole_step(x64):
    _, params, x, _, estimator, _ = problem()
    tx = step_norms.watch(optax.sgd(0.1, momentum=0.9), momentum=0.9)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        return tx.update(gradient(params, x), state, params, curvature=estimator.at(params, x))

    for _ in range(2):
        moved, state = step(params, state)
        move = oracles.flatten(moved)
        expected = 0.01 * move @ dense_fisher(params, x) @ move
        np.testing.assert_allclose(state.square, expected, rtol=1e-6)
        params = optax.apply_updates(params, moved)


def test_a_row_has_losses_and_norms_of_each_part():
    found = [(0.25, np.arange(60.0)), (0.5, np.zeros(60))]
    cells = step_norms.row("net", found).strip("| ").split(" | ")
    assert cells == [
        "net",
        "0.250 0.500",
        "0.0e+00, 9.0e+00",
        "5.0e+00, 4.9e+01",
        "2.5e+01, 5.9e+01",
    ]


def test_a_small_run_has_a_norm_for_every_step():
    config = step_norms.settings_of("deep_tanh", small=True)
    found = step_norms.runs(config, "kfac", [1e-3, 1e-2], seeds=1)
    (loss, squares), (_, longer) = found[1e-3][0], found[1e-2][0]
    assert squares.shape == (8,) and np.isfinite(loss)
    # a rate ten times as large: a hundred times the square where KL-clip is not active
    assert bool(jnp.all(squares > 0)) and longer[0] > 10 * squares[0]
