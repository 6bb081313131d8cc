"""What different methods have in common, each identity between parts that share little code."""

import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.methods.gradient import psgd_fit
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")
N = 4
ravel = lambda tree: np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def update_of(tx, gradient, params, curvature, steps=1):
    """The update after so many statistics of one batch, without a move."""
    run = jax.jit(lambda s: tx.update(gradient, s, params, curvature=curvature))
    state = tx.init(params)
    for _ in range(steps):
        update, state = run(state)
    return update


def normal_of(activation):
    """A prediction of unit variance by the plain stack."""
    return lambda params, x: ko.Normal(oracles.forward(params, x, activation=activation)[0])


def test_a_diagonal_psgd_of_newton_pairs_is_esgd():
    """Both divide by `sqrt(E (H v)_i^2)`, norms of the Hessian's rows; all signs for `v`."""
    hessian = np.array([[2.0, 1.0, 0.5], [1.0, -3.0, 0.3], [0.5, 0.3, 1.0]])
    products = [hessian @ signs for signs in itertools.product((-1.0, 1.0), repeat=3)]
    tx, g = ko.esgd(damping=1e-12, curvature_every=1), jnp.array([1.0, -2.0, 0.5])
    state, step = tx.init(g), jax.jit(lambda s, hv: tx.update(g, s, hvp=lambda v: hv))
    for product in products:
        equilibrated, state = step(state, jnp.asarray(product))
    moment = jnp.asarray(np.mean(np.square(products), 0))

    def fit(q, _):
        # S = Q^2 E h^2 and T = Q^{-2} E v^2, which are equal at rest
        return psgd_fit.moved(q, q**2 * moment, q**-2, jnp.float64(0.3)), None

    q = jax.jit(lambda q: jax.lax.scan(fit, q, length=400)[0])(jnp.ones((1, 3)))
    np.testing.assert_allclose(q[0] ** 2 * g, equilibrated, rtol=1e-9)
    np.testing.assert_allclose(moment, np.sum(hessian**2, 1), rtol=1e-12)


def test_ekfac_is_kfac_on_a_deep_linear_net():
    """There the moments of the gradient in the eigenbasis are products of the eigenvalues."""
    params, x = oracles.make_params(0, (3, 4, 2)), oracles.normal(1, (6, 3))
    estimator = ko.ggn(normal_of(lambda s: s))
    layers, gradient = estimator.layers(params, x), oracles.make_params(2, (3, 4, 2))
    words = dict(damping=0.1, kl_clip=None, curvature_every=1)
    # the second statistic is taken in the basis that the first one has given
    updates = [
        update_of(tx, gradient, params, estimator.at(params, x), steps=2)
        for tx in (ko.ekfac(layers, **words), ko.kfac(layers, inverse="eigh", **words))
    ]
    np.testing.assert_allclose(*map(ravel, updates), rtol=1e-9, atol=1e-12)


def test_blocks_of_the_hessian_are_those_of_gauss_newton_where_slopes_are_constant():
    """A net of ramps is linear in each layer by itself, so a layer's second derivatives vanish."""
    params, x = oracles.make_params(0, (3, 4, 2)), oracles.normal(1, (N, 3))
    predict, y = normal_of(jax.nn.relu), oracles.normal(2, (N, 2))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda v: predict(unravel(v), x).mean_nll(y)))(flat)
    curvature = ko.ggn(predict).at(params, x)
    product = lambda v: jax.flatten_util.ravel_pytree(curvature.vector_product(unravel(v)))[0]
    newton = jax.jit(jax.vmap(product))(jnp.eye(len(flat)))
    first = len(ravel(params["layer0"]))
    for mine in (slice(None, first), slice(first, None)):
        np.testing.assert_allclose(hessian[mine, mine], newton[mine, mine], atol=1e-12)
    assert np.abs(hessian[:first, first:] - newton[:first, first:]).max() > 1e-2


def test_how_far_natural_gradients_move_the_outputs():
    """With inputs of full row rank in every layer and next to no damping the residual falls by
    `alpha` times itself to first order: `alpha` is 1 of the exact one and the number of layers of
    the exact blocks. K-FAC's count every example as one of its own: `N` in a layer whose output
    gradients have full rank as well, 1 in that of the one output.
    """
    params, x = oracles.make_params(0, (6, 7, 7, 1)), oracles.normal(1, (N, 6))
    predict, y = normal_of(jnp.tanh), oracles.normal(2, (N, 1))
    estimator = ko.ggn(predict)
    gradient = jax.grad(lambda p: predict(p, x).mean_nll(y))(params)
    curvature, outputs = estimator.at(params, x), lambda p: oracles.forward(p, x, tapped=False)[0]
    residual = outputs(params) - y
    pseudo = ko.smw(damping=0.0, cutoff=1e-9)
    exact = update_of(pseudo, gradient, params, curvature)
    blocks = {}
    for name in params:
        mask = {other: other == name for other in params}
        blocks[name] = update_of(optax.masked(pseudo, mask), gradient, params, curvature)[name]
    kfac = ko.kfac(estimator.layers(params, x), damping=1e-11, inverse="eigh", kl_clip=None)
    kronecker = update_of(kfac, gradient, params, curvature)
    for update, alpha in ((exact, 1), (blocks, 3), (kronecker, 2 * N + 1)):
        moved = jax.jvp(outputs, (params,), (update,))[1]
        np.testing.assert_allclose(moved, alpha * residual, rtol=1e-4, atol=1e-5)


def test_a_layer_in_every_step_of_an_ode_has_integrals_for_factors():
    """`z <- z + dt tanh(z W)`: `A` is the sum of `z z^T` over steps and `G` the mean of `g g^T`, with
    `g` the adjoint `dt tanh' (dl / dz)` of a step; and EKFAC's moments are those of whole gradients.
    """
    steps, dt = 3, 0.4
    w, x = oracles.normal(0, (2, 2)), oracles.normal(1, (N, 2))

    def outputs(w, x, shifts, tap=lambda s, z, w: s):
        for k in range(steps):
            x = x + dt * jnp.tanh(tap(x @ w, x, w) + shifts[k])
        return x

    estimator = ko.ggn(lambda w, x: ko.Normal(outputs(w, x, jnp.zeros(steps), ko.tap_dense)))
    layers, v = estimator.layers(w, x), oracles.normal(2, (2, 2))
    # z of every step, [N, steps, 2], and g of every output, [2, N, steps, 2]
    states, z = [], x
    for _ in range(steps):
        states.append(z)
        z = z + dt * jnp.tanh(z @ w)
    a = jnp.stack(states, 1)
    of_one = lambda x, c: jax.grad(lambda s: outputs(w, x, s)[c])(jnp.zeros((steps, 2)))
    g = jnp.stack([jax.vmap(lambda x, c=c: of_one(x, c))(x) for c in range(2)])
    left, right = jnp.einsum("nti,ntj->ij", a, a) / N, jnp.einsum("cnti,cntj->ij", g, g) / N / steps
    words = dict(damping=0.1, kl_clip=None)
    got = update_of(ko.kfac(layers, inverse="eigh", **words), v, w, estimator.at(w, x))
    dense = np.kron(left, right) + 0.1 * np.eye(4)
    np.testing.assert_allclose(ravel(got), np.linalg.solve(dense, ravel(v)), rtol=1e-9)
    basis = np.kron(*(np.linalg.eigh(m)[1] for m in (left, right)))
    whole = jnp.einsum("nti,cntj->cnij", a, g).reshape(-1, 4)
    moments = np.mean(np.square(whole @ basis), 0) * 2  # of both outputs together
    expected = basis @ (basis.T @ ravel(v) / (moments + 0.1))
    ekfac = ko.ekfac(layers, curvature_every=1, **words)
    got = update_of(ekfac, v, w, estimator.at(w, x), steps=2)
    np.testing.assert_allclose(ravel(got), expected, rtol=1e-9)


def test_k_bfgs_solves_least_squares_of_one_layer_at_once():
    """`H_A` begins as the inverse of `E[a a^T]`, and `H_G` with the identity, which is right."""
    x, y = oracles.normal(0, (6, 3)), oracles.normal(1, (6, 2))
    losses = lambda w, x, y: jnp.sum(jnp.square(ko.tap_dense(x @ w, x, w) - y), 1) / 2
    estimator, w = ko.empirical_fisher(losses), oracles.normal(2, (3, 2))
    tx = ko.k_bfgs(estimator.layers(w, x, y), learning_rate=1.0, damping=1e-24)
    gradient = jax.grad(lambda w: losses(w, x, y).mean())(w)
    step = update_of(tx, gradient, w, estimator.at(w, x, y))
    np.testing.assert_allclose(w + step, np.linalg.pinv(x) @ y, rtol=1e-8)
