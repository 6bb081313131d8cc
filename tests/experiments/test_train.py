import jax
import numpy as np
import optax
import pytest

from kfac_optax.experiments import catalogue_optimizers, optimizers, train

# one-level K-FAC runs on the digits below
ON_DEEP_LINEAR = (
    "sgd",
    "adam",
    "two_level",
    "two_level_exact",
)


def losses(trainer, config, **run):
    return [metrics.train_loss for metrics in train.run(trainer, config, **run)]


@pytest.mark.parametrize("name", ON_DEEP_LINEAR)
def test_every_optimizer_learns_the_deep_linear_problem(deep_linear, trainers, name):
    deep_linear.epochs = 6
    trainer = trainers(name)
    history = list(train.run(trainer, deep_linear, rate=1e-2, seed=0))
    assert trainer.steps == 4
    assert [metrics.epoch for metrics in history] == list(range(1, 7))
    assert history[-1].train_loss < history[0].train_loss
    assert all(metrics.seconds > 0 and 0 <= metrics.test_accuracy <= 1 for metrics in history)


def test_a_model_without_batch_statistics_is_trained_too(digits):
    history = losses(train.prepare(digits, "kfac"), digits, rate=1e-2, seed=0)
    assert history[1] < history[0]


def test_gradients_from_their_rows_train_alike(deep_linear):
    """With batch statistics, which come out of the same pass; in a compiled loop and step by step."""
    deep_linear.update(batch_size=4)
    deep_linear.data.update(train=8, test=4, features=12)
    deep_linear.model.update(depth=1, width=16)
    deep_linear.kfac.update(inverse="cholesky")
    histories = []
    for factored, python_loop in ((False, False), (True, False), (True, True)):
        deep_linear.kfac = deep_linear.kfac.to_dict() | {"factored_gradient": factored}
        deep_linear.update({"python_loop": python_loop})
        trainer = train.prepare(deep_linear, "kfac")
        histories.append([row[:5] for row in train.run(trainer, deep_linear, rate=1e-2, seed=0)])
    for other in histories[1:]:
        np.testing.assert_allclose(other, histories[0], rtol=1e-5)


def test_one_compilation_serves_every_rate_and_seed(deep_linear, trainers):
    trainer = trainers("adam")
    first = losses(trainer, deep_linear, rate=1e-3, seed=0)
    assert losses(trainer, deep_linear, rate=1e-3, seed=0) == first
    assert losses(trainer, deep_linear, rate=1e-1, seed=0) != first
    assert losses(trainer, deep_linear, rate=1e-3, seed=1) != first


def test_optimizers_start_from_the_same_weights_and_data(deep_linear, trainers):
    dataset, key = train.start(deep_linear, seed=3)
    rate = np.float32(1e-3)
    params = [trainers(name).init(rate, key, dataset).params for name in ("sgd", "two_level")]
    for other in params[1:]:
        jax.tree.map(np.testing.assert_array_equal, params[0], other)


def test_a_diverged_run_stops_early(deep_linear, trainers):
    deep_linear.epochs = 5
    history = losses(trainers("sgd"), deep_linear, rate=float("inf"), seed=0)
    assert len(history) == 1
    assert not np.isfinite(history[0])


def test_the_reported_loss_is_a_mean_over_targets(deep_linear):
    deep_linear.data.target_dim = 5
    deep_linear.model.depth = 0
    first = losses(train.prepare(deep_linear, "sgd"), deep_linear, rate=1e-9, seed=0)[0]
    assert 0.3 < first < 2.0  # a sum over five targets would be near 5 log 2 or above


def test_decay_follows_the_preconditioner_but_precedes_adam(deep_linear):
    deep_linear.weight_decay = 0.5
    params, zero = {"w": np.full(2, 3.0, np.float32)}, {"w": np.zeros(2, np.float32)}

    def first_update(tx):
        return tx.update(zero, tx.init(params), params)[0]["w"]

    decayed = first_update(
        catalogue_optimizers.preconditioned(optax.identity(), deep_linear, 0.1, 0.9)
    )
    np.testing.assert_allclose(decayed, -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(
        first_update(optimizers.OPTIMIZERS["sgd"].build(deep_linear, None, 0.1)), decayed, rtol=1e-6
    )
    np.testing.assert_allclose(
        first_update(optimizers.OPTIMIZERS["adam"].build(deep_linear, None, 0.1)), -0.1, rtol=1e-4
    )


def test_a_batch_larger_than_the_data_is_refused(deep_linear):
    deep_linear.batch_size = 71
    with pytest.raises(
        ValueError, match="config.batch_size: got 71, expected at most the 70 training examples"
    ):
        train.prepare(deep_linear, "sgd")


def test_an_unknown_optimizer_is_refused(deep_linear):
    with pytest.raises(ValueError, match="config.optimizers: got 'newton', expected one of"):
        train.prepare(deep_linear, "newton")
