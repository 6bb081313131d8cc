"""Deep linear networks, where the natural gradient is known in closed form."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import oracles

SIZES = (3, 4, 4, 2)
L = len(SIZES) - 1


def linear(params, x):
    return oracles.regressor(params, x, lambda s: s)


def function(params):
    """The matrix that the whole network is."""
    return oracles.forward(params, jnp.eye(3), activation=lambda s: s, tapped=False)[0]


class Setting:
    """A network, the best matrix, and their loss."""

    def __init__(self):
        self.params = oracles.make_params(0, SIZES, bias=False)
        self.x, self.best = oracles.normal(1, (12, 3)), oracles.normal(2, (3, 2))
        self.estimator = ko.ggn(linear)
        self.layers = self.estimator.layers(self.params, self.x)

    def loss(self, params):
        # half the square of the residual, without the constant of the likelihood
        residual = self.x @ (function(params) - self.best)
        return jnp.mean(jnp.sum(jnp.square(residual), 1)) / 2

    def update(self, tx):
        @jax.jit
        def run(params):
            grads, curvature = jax.grad(self.loss)(params), self.estimator.at(params, self.x)
            return tx.update(grads, tx.init(params), params, curvature=curvature)[0]

        return run(self.params)


def test_it_moves_the_function_as_the_natural_gradient(x64):
    """Both take the whole error away to first order, though their parameters differ; K-FAC does so
    `L` times.
    """
    case = Setting()
    error = function(case.params) - case.best
    directions = {
        "linear": case.update(ko.linear_natural(case.layers, damping=1e-12)),
        # least squares over all parameters: of all steps that do so the shortest
        "exact": case.update(ko.smw(damping=1e-9)),
        "kfac": case.update(ko.kfac(case.layers, damping=1e-12, kl_clip=None)),
    }
    moved = {k: jax.jvp(function, (case.params,), (u,))[1] for k, u in directions.items()}
    np.testing.assert_allclose(moved["linear"], error, rtol=1e-8)
    np.testing.assert_allclose(moved["exact"], error, rtol=1e-6)
    np.testing.assert_allclose(moved["kfac"], L * error, rtol=1e-8)
    one, other = (directions[k]["layer0"]["kernel"] for k in ("linear", "exact"))
    assert np.abs(one - other).max() > 0.05


def test_the_logarithm_of_the_loss_falls_with_slope_two(x64):
    case, rate, steps = Setting(), 1e-3, 50
    tx = optax.chain(
        ko.linear_natural(case.layers, damping=1e-12, decay=0.0),
        optax.sgd(rate),
    )

    def step(carry, _):
        params, state = carry
        curvature = case.estimator.at(params, case.x)
        grads = jax.grad(case.loss)(params)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state), None

    start = case.params, tx.init(case.params)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(start)
    fallen = jnp.log(case.loss(params) / case.loss(case.params))
    # -2 in time, and -rate of it for the finite step
    np.testing.assert_allclose(fallen / (steps * rate), -2, atol=2 * rate)


def test_without_weights_between_units_there_is_nothing_to_share():
    estimator = ko.ggn(lambda s, x: ko.Normal(ko.tap_scale_shift(x * s, x, s)))
    layers = estimator.layers(jnp.ones(2), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="linear_natural: no layer is left"):
        ko.linear_natural(layers)


def test_the_default_damping_keeps_a_softmax_net_from_jumping():
    """A logit is asked to move by `1/p`, far out of the region in which tanh layers are linear, and
    most of all along inputs that hardly vary.
    """
    x, y = oracles.normal(5, (48, 6)) * 10.0 ** -jnp.linspace(0, 1, 6), jnp.arange(48) % 4
    params = oracles.make_params(0, (6, 8, 4))
    estimator = ko.ggn(oracles.classifier)
    layers = estimator.layers(params, x)
    default = inspect.signature(ko.linear_natural).parameters["damping"].default

    @jax.jit
    def losses(damping):
        tx = optax.chain(ko.linear_natural(layers, damping=damping), optax.sgd(0.3))

        def step(carry, _):
            params, state = carry
            loss = lambda p: estimator.spec.function(p, x).mean_nll(y)
            value, grads = jax.value_and_grad(loss)(params)
            curvature = estimator.at(params, x)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=20)[1]

    gentle, wild = np.asarray(losses(default)), np.asarray(losses(1e-6))
    assert np.all(np.diff(gentle) < 0) and gentle[-1] < 0.7 * gentle[0]
    # the same rule with next to no damping
    assert np.max(np.diff(wild)) > 1
