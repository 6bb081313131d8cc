"""The forward Laplacian against automatic differentiation, and what K-FAC sees of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.experiments import jets
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")


def small(sizes=(3, 5, 4, 1), n=6):
    params = jets.init(jax.random.key(0), sizes, jnp.float64)
    params = jax.tree.map(lambda w: w + 0.3 * oracles.normal(9, w.shape), params)  # biases too
    return params, oracles.normal(1, (n, sizes[0]))


@pytest.mark.parametrize("times", [0, 1])
def test_derivatives_are_those_of_automatic_differentiation(times):
    params, x = small()
    one = lambda point: jets.network(params, point[None])[0]
    jet = jax.jit(jets.network_jet, static_argnums=2)(params, x, times)
    hessians = np.asarray(jax.jit(jax.vmap(jax.hessian(one)))(x))
    want = np.trace(hessians[:, times:, times:], axis1=1, axis2=2)
    np.testing.assert_allclose(jet.value[:, 0], jets.network(params, x), rtol=1e-12)
    np.testing.assert_allclose(jet.slopes[..., 0], jax.vmap(jax.grad(one))(x), rtol=1e-10)
    np.testing.assert_allclose(jet.laplacian[:, 0], want, rtol=1e-10)


def test_every_row_is_measured_and_only_values_meet_the_bias():
    params, x = small()
    estimator = ko.ggn(lambda p, x: ko.Normal(jets.network_jet(p, x).laplacian[:, 0]))
    layers = estimator.layers(params, x)
    assert [layer.rows for layer in layers] == [6 * 5] * 3
    assert not layers.uncovered
    factors, _ = jax.jit(lambda: estimator.at(params, x).statistics(oracles.plan(layers)))()
    first = factors[0].inputs[0]
    rows = np.concatenate([np.asarray(x), np.ones((6, 1))], 1)
    slopes = np.diag([1.0, 1, 1, 0])  # the identity, once for every point
    np.testing.assert_allclose(first, rows.T @ rows / 6 + slopes, rtol=1e-10)


def test_what_is_measured_is_all_that_the_laplacian_depends_on():
    """The gradient is the product of the measured rows."""
    params, x = small()
    estimator = ko.ggn(lambda p, x: ko.Normal(jets.network_jet(p, x).laplacian[:, 0]))
    step = estimator.value_and_grad(lambda prediction, _: 0.5 * jnp.mean(prediction.mean**2))
    layers = estimator.layers(params, x)

    @jax.jit
    def products():
        _, grads, curvature = step(params, x)
        plan = oracles.plan(layers, block=ko.kronecker("cholesky"))
        rows = curvature.gradient_rows(plan).values()
        return grads, [jnp.einsum("crp,crq->pq", a, g) for a, g in rows]

    grads, made = products()
    assert len(made) == 3
    for got, want in zip(made, grads.values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
