"""Evaluations with batch statistics of the weights at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax.experiments import batch_statistics, results, steps, train
from kfac_optax.experiments.results import Job


def test_momentum_and_statistics_come_out_of_the_update_rule():
    batches = [np.array([3.0, 1e6]), np.array([-1.0, 2e6])]
    m = np.array([0.9, 0.25])
    runs = [lambda old, b=b: m * old + (1 - m) * b for b in map(jnp.asarray, batches)]
    found = batch_statistics.momentum(runs[0], jnp.ones(2))
    np.testing.assert_allclose(found, m, rtol=1e-6)
    np.testing.assert_allclose(
        batch_statistics.mean_over(runs, jnp.ones(2), found), [1.0, 1.5e6], rtol=1e-5
    )


def test_an_evaluation_uses_the_statistics_of_its_weights(deep_linear):
    deep_linear.model.depth = 1
    trainer = train.prepare(deep_linear, "sgd")
    dataset, key = train.start(deep_linear, seed=0)
    state = trainer.init(np.float32(0.1), key, dataset)
    moved = jax.tree.map(lambda p: 3 * p, state.params)
    batches = dataset.train_x[:64].reshape(4, 16, -1) @ moved["Dense_0"]["kernel"]
    stats = {"mean": batches.mean(1).mean(0), "var": batches.var(1).mean(0)}
    problem = steps.problem(deep_linear, "sgd", dataset)
    model_state = {"batch_stats": {"BatchNorm_0": stats}}
    expected = steps.evaluate(problem, moved, model_state, dataset, 0, size=20)
    np.testing.assert_allclose(
        trainer.evaluate(moved, state.model_state, dataset), expected, rtol=1e-5
    )

    deep_linear.evaluate_with = "running"
    running = train.prepare(deep_linear, "sgd").evaluate(moved, state.model_state, dataset)
    before = steps.evaluate(problem, moved, state.model_state, dataset, 0, size=20)
    np.testing.assert_allclose(running, before, rtol=1e-6)
    assert abs(running[0] - expected[0]) > 1e-3


def test_the_choice_is_checked_and_a_setting_of_the_run(deep_linear):
    fresh = results.run_settings(deep_linear, Job("sgd", 0.1, 0))
    deep_linear.evaluate_with = "running"
    assert results.run_settings(deep_linear, Job("sgd", 0.1, 0)) != fresh
    with pytest.raises(ValueError, match="config.evaluate_with: got 'now', expected one of"):
        batch_statistics.check("now")
