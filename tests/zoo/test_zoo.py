"""Public-style models as people write them: every parameter is found, measured right, and trained.

Run with `-m slow`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._tree import named_leaves
from tests import oracles
from tests.layers.gradients import assert_gradients, squares
from tests.zoo import haiku_models, library_models, models, more_models
from tests.zoo.models import N

PLAIN = models.MODELS | more_models.MODELS
MADE = library_models.MODELS | haiku_models.MODELS
MODELS = (*PLAIN, *MADE)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]
every_model = pytest.mark.parametrize("name", MODELS)


def problem(name):
    """The model with outputs `[N, q]`, its parameters and inputs in double precision."""
    model = PLAIN[name] if name in PLAIN else MADE[name]()
    params, inputs = jax.tree.map(jnp.asarray, (model.params, model.inputs))
    outputs = lambda p, *x: model.function(p, *x).reshape(N, -1)
    return outputs, params, inputs, model.uncovered


@every_model
def test_rows_of_every_layer_give_its_gradient(name):
    """All uses of every parameter: `(1/N) sum a g^T` is the gradient, and nothing is left over."""
    outputs, params, inputs, uncovered = problem(name)
    losses = lambda p, *x: squares(outputs(p, *x))
    layers = assert_gradients(losses, params, *inputs, uncovered=uncovered)
    assert not [layer.path for layer in layers if layer.partly]


@every_model
def test_products_are_those_of_gauss_and_newton(name):
    """Against one forward-mode and one reverse-mode derivative, without this library."""
    outputs, params, inputs, _ = problem(name)
    vector = jax.tree.map(lambda x: oracles.normal(x.size, x.shape), params)
    estimator = ko.ggn(lambda p, *x: ko.Normal(outputs(p, *x)))
    got = jax.jit(estimator.vector_product)(params, vector, *inputs)
    of = lambda p: outputs(p, *inputs)
    _, tangent = jax.jvp(of, (params,), (vector,))
    (expected,) = jax.vjp(of, params)[1](tangent / N)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for path, value in named_leaves(expected).items():
        atol = 1e-12 * largest  # of directions that change nothing
        np.testing.assert_allclose(named_leaves(got)[path], value, rtol=1e-6, atol=atol)


@every_model
def test_a_step_of_two_levels_is_finite_and_downhill(name):
    outputs, params, inputs, _ = problem(name)
    estimator = ko.fisher(lambda p, *x: ko.Normal(outputs(p, *x)))
    layers = estimator.layers(params, *inputs)
    loss = lambda p: squares(outputs(p, *inputs)).mean()
    tx = optax.chain(ko.kfac_two_level(layers, learning_rate=1e-2, damping=0.1), optax.sgd(1e-2))

    @jax.jit
    def step(params, state):
        gradient = jax.grad(loss)(params)
        at = estimator.at(params, *inputs, key=jax.random.key(0))
        return gradient, *tx.update(gradient, state, params, curvature=at)

    gradient, updates, state = step(params, tx.init(params))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    assert float(optax.tree.vdot(gradient, updates)) < 0
    assert ko.problems(state) == []
