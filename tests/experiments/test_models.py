import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from kfac_optax.experiments import models
from kfac_optax.experiments.likelihoods import LIKELIHOODS

X = jax.random.normal(jax.random.key(0), (32, 3))


def build(name: str, **options):
    return models.build(ml_collections.ConfigDict({"name": name, **options}), outputs=2)


def test_linear_mlp_has_no_biases_and_a_norm_after_each_hidden_layer():
    params, model_state = models.init(build("linear_mlp", depth=5, width=4), jax.random.key(1), X)
    dense = [value for name, value in params.items() if name.startswith("Dense")]
    assert len(dense) == 6
    assert all(set(layer) == {"kernel"} for layer in dense)
    assert len(params) - len(dense) == len(model_state["batch_stats"]) == 5


def test_linear_mlp_is_linear_in_evaluation():
    model = build("linear_mlp", depth=3, width=4)
    params, model_state = models.init(model, jax.random.key(1), X)

    def f(x):
        return models.apply(model, params, model_state, x, train=False)[0]

    np.testing.assert_allclose(f(X) + f(-X), 2 * f(jnp.zeros_like(X)), atol=1e-5)


def test_training_moves_the_running_averages_and_evaluation_uses_them():
    model = build("linear_mlp", depth=1, width=4)
    params, before = models.init(model, jax.random.key(1), X)
    trained, after = models.apply(model, params, before, X, train=True)
    assert not np.allclose(
        after["batch_stats"]["BatchNorm_0"]["mean"], before["batch_stats"]["BatchNorm_0"]["mean"]
    )
    evaluated, kept = models.apply(model, params, after, X, train=False)
    assert kept is after
    assert not np.allclose(evaluated, trained)


def test_a_model_without_statistics_carries_none():
    model = build("mlp", widths=(5,))
    params, model_state = models.init(model, jax.random.key(1), X)
    assert model_state == {}
    logits, model_state = models.apply(model, params, model_state, X, train=True)
    assert logits.shape == (32, 2)
    assert model_state == {}


@pytest.mark.parametrize(("name", "shape"), [("bernoulli", (6, 3)), ("categorical", (6,))])
def test_nll_is_the_one_of_the_library(name, shape):
    likelihood = LIKELIHOODS[name]
    y = jax.random.bernoulli(jax.random.key(3), 0.5, shape).astype(
        jnp.float32 if len(shape) == 2 else jnp.int32
    )
    logits = jax.random.normal(jax.random.key(2), (6, 3))
    np.testing.assert_allclose(
        likelihood.nll(logits, y), likelihood.distribution(logits).nll(y), rtol=1e-5
    )


def test_correct_counts_each_target_by_its_sign():
    logits, y = jnp.array([[2.0, -1.0], [3.0, 4.0]]), jnp.array([[1.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(LIKELIHOODS["bernoulli"].score(logits, y), [0.5, 1.0])
    np.testing.assert_allclose(
        LIKELIHOODS["categorical"].score(logits, jnp.array([0, 0])), [1.0, 0.0]
    )


def test_targets_decide_the_number_of_outputs():
    assert LIKELIHOODS["bernoulli"].outputs(jnp.zeros((7, 3))) == 3
    assert LIKELIHOODS["categorical"].outputs(jnp.array([0, 4, 2])) == 5
    assert LIKELIHOODS["bernoulli"].targets(jnp.zeros((7, 3))) == 3
    assert LIKELIHOODS["categorical"].targets(jnp.zeros(7)) == 1


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="config.model.name: got 'lenet', expected one of"):
        build("lenet")
