"""The lower bound of an adapted damping that follows the size of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko


def of_examples(w, x):
    return ko.Normal(ko.tap_dense(x @ w, x, w))


def of_positions(w, x):
    # one label for every position of an example
    rows = x.reshape(len(x), 4, -1)
    return ko.Categorical(ko.tap_dense(rows @ w, rows, w))


def two_heads(w, x):
    out = ko.tap_dense(x @ w, x, w)
    return ko.Normal(out), ko.Normal(out[:3])


@pytest.mark.parametrize(
    ("predict", "cases"), [(of_examples, 8), (of_positions, 32), (two_heads, 3)]
)
def test_cases_are_predictions_with_a_loss_of_their_own(predict, cases):
    x = jnp.ones((8, 12))
    w = jnp.ones((3 if predict is of_positions else 12, 2))
    for estimator in (ko.fisher(predict), ko.fisher(predict, subsample=4)):
        # of the whole batch, whatever part of it is measured
        assert estimator.at(w, x, key=jax.random.key(0)).cases() == cases


def test_devices_that_share_a_batch_count_together():
    x, w = jnp.ones((2, 8, 12)), jnp.ones((12, 2))
    estimator = ko.ggn(of_examples)
    found = jax.vmap(
        lambda x: jnp.float32(estimator.at(w, x).cases(axis_name="devices")), axis_name="devices"
    )(x)
    assert found.tolist() == [16, 16]


def falling(damping_min, batch):
    """The damping after one step of a right model, whose factor is far below any bound."""
    estimator = ko.ggn(of_examples)
    w, x, target = jnp.zeros((3, 2)), jnp.eye(batch, 3), jnp.ones((batch, 2))

    def loss(w):
        return of_examples(w, x).mean_nll(target)

    tx = ko.adapt_damping(
        optax.chain(ko.quadratic_step()),
        initial_damping=1.0,
        every=1,
        decay=1e-6,
        damping_min=damping_min,
    )
    value, grads = jax.value_and_grad(loss)(w)
    _, state = tx.update(
        grads, tx.init(w), w, curvature=estimator.at(w, x), value=value, value_fn=loss
    )
    return float(state.model_damping)


@pytest.mark.parametrize(("batch", "least"), [(3, 0.01), (128, 0.01), (256, 0.005), (1280, 0.001)])
def test_the_damping_falls_as_far_as_the_batch_allows(batch, least):
    np.testing.assert_allclose(falling(None, batch), least, rtol=1e-6)


def test_a_bound_that_is_given_holds_for_any_batch():
    np.testing.assert_allclose([falling(0.2, 3), falling(0.2, 1280)], 0.2, rtol=1e-6)


def test_the_largest_damping_is_not_below_the_least():
    with pytest.raises(ValueError, match=r"adapt_damping: damping_max=0\.001"):
        ko.adapt_damping(ko.quadratic_step(), damping_min=None, damping_max=1e-3)


def test_the_presets_leave_the_bound_to_the_batch():
    w, x = jnp.zeros((3, 2)), jnp.eye(256, 3)
    estimator = ko.ggn(of_examples)
    tx = ko.kfac_adaptive(estimator.layers(w, x), initial_damping=0.005, damping_decay=0.5)
    target = jnp.ones((256, 2))

    def loss(w):
        return of_examples(w, x).mean_nll(target)

    state = tx.init(w)
    for _ in range(5):
        value, grads = jax.value_and_grad(loss)(w)
        updates, state = tx.update(
            grads, state, w, curvature=estimator.at(w, x), value=value, value_fn=loss
        )
        w = optax.apply_updates(w, updates)
    # 0.005 = 1.28 / 256: the first adaptation finds it at the bound
    np.testing.assert_allclose(state.model_damping, 0.005, rtol=1e-6)
    assert state.damping_at_bound == 1
