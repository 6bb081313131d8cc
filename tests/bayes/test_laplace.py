"""Laplace's approximation: exact where the model is linear, and the dense one elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests import oracles

N, SIGMA, TAU = 7, 0.5, 0.3


def linear():
    """Bayesian linear regression with two outputs: estimator, MAP, data, design matrix, targets."""
    x, y = oracles.normal(0, (N, 2)), oracles.normal(1, (N, 2))
    design = np.concatenate([x, np.ones((N, 1))], 1)
    precision = design.T @ design / SIGMA**2 + TAU * np.eye(3)
    weights = np.linalg.solve(precision, design.T @ y / SIGMA**2)
    params = {"all": {"kernel": jnp.asarray(weights[:2]), "bias": jnp.asarray(weights[2])}}

    def predict(p, x):
        return ko.Normal(oracles.forward(p, x)[0], SIGMA)

    return ko.ggn(predict), params, x, y, design, precision


def test_a_linear_gaussian_model_is_exact(x64):
    """Covariance, predictive distribution and evidence of Bayesian linear regression."""
    estimator, params, x, y, design, precision = linear()
    posterior = ko.laplace(estimator, params, [(x,)], prior_precision=TAU)
    assert float(posterior.size) == N
    covariance = np.linalg.inv(precision)
    got = oracles.tree_matrix(posterior.covariance_product, params)
    np.testing.assert_allclose(got, np.kron(covariance, np.eye(2)), rtol=1e-8, atol=1e-10)
    new = oracles.normal(2, (3, 2))
    rows = np.concatenate([new, np.ones((3, 1))], 1)
    variance = np.einsum("ni,ij,nj->n", rows, covariance, rows)
    outputs, predicted = jax.jit(lambda p: (p.outputs(new, batch_size=2), p.predict(new)))(
        posterior
    )
    expected = variance[:, None, None] * np.eye(2)
    np.testing.assert_allclose(outputs.covariance, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(predicted.mean, rows @ weights_of(params), rtol=1e-10)
    np.testing.assert_allclose(predicted.scale[:, 0] ** 2, variance + SIGMA**2, rtol=1e-8)
    loss = estimator.spec.function(params, x).mean_nll(y)
    marginal = design @ design.T / TAU + SIGMA**2 * np.eye(N)
    _, logdet = np.linalg.slogdet(2 * np.pi * marginal)
    exact = -(np.einsum("nc,nm,mc->", y, np.linalg.inv(marginal), y) + 2 * logdet) / 2
    np.testing.assert_allclose(posterior.log_evidence(loss), exact, rtol=1e-9)


def weights_of(params):
    return oracles.flatten(params).reshape(3, 2)


def test_samples_have_mean_and_covariance(x64):
    estimator, params, x, _, _, precision = linear()
    posterior = ko.laplace(estimator, params, [(x,)], prior_precision=TAU)
    count = 4000
    draws = jax.jit(lambda key: posterior.sample(key, count))(jax.random.key(0))
    parts = draws["all"]["kernel"], draws["all"]["bias"][:, None]
    centred = np.concatenate(parts, 1).reshape(count, -1) - oracles.flatten(params)
    dense = np.kron(np.linalg.inv(precision), np.eye(2))
    spread = np.sqrt(np.diag(dense))
    assert (np.abs(centred.mean(0)) < 4.5 * spread / np.sqrt(count)).all()
    error = np.abs(centred.T @ centred / count - dense)
    assert (error < 4.5 * np.outer(spread, spread) * np.sqrt(2 / count)).all()


def mlp(block=None, **words):
    params, x = oracles.make_params(0, (3, 4, 2)), oracles.normal(1, (N, 3))
    estimator = ko.ggn(oracles.classifier)
    s = jnp.asarray(oracles.softmax_columns(oracles.forward(params, x)[0]))
    rows = oracles.per_example(params, x, s)
    batches = words.pop("batches", [(x,)])
    posterior = ko.laplace(estimator, params, batches, prior_precision=TAU, block=block, **words)
    return posterior, params, x, rows


def covariance_of(posterior, params):
    return oracles.tree_matrix(posterior.covariance_product, params)


def test_a_network_has_the_dense_block_diagonal(x64):
    """Covariance, the outputs' covariance from the dense Jacobian, probit; batches of any size."""
    x = oracles.normal(1, (N, 3))
    posterior, params, _, (a, g) = mlp(batches=[(x[:5],), (x[5:],)])
    blocks = oracles.block_diagonal(oracles.kronecker_fisher(a, g), oracles.block_sizes(a, g))
    dense = np.linalg.inv(N * blocks + TAU * np.eye(len(blocks)))
    np.testing.assert_allclose(covariance_of(posterior, params), dense, rtol=1e-7, atol=1e-9)
    new = oracles.normal(2, (2, 3))
    jacobian = jax.jit(jax.jacrev(lambda p: oracles.forward(p, new)[0]))(params)
    flat = np.stack(
        [
            [oracles.flatten(jax.tree.map(lambda j, n=n, c=c: j[n, c], jacobian)) for c in range(2)]
            for n in range(2)
        ]
    )
    outputs, predicted = jax.jit(lambda p: (p.outputs(new), p.predict(new)))(posterior)
    want = np.einsum("nci,ij,ndj->ncd", flat, dense, flat)
    np.testing.assert_allclose(outputs.covariance, want, rtol=1e-7)
    shrink = np.sqrt(1 + np.pi / 8 * np.einsum("ncc->nc", want))
    logits = oracles.forward(params, new)[0] / shrink
    np.testing.assert_allclose(predicted.logits, logits, rtol=1e-7)
    _, logdet = np.linalg.slogdet(N * blocks + TAU * np.eye(len(blocks)))
    theta = oracles.flatten(params)
    want = -N * 0.7 - (TAU * theta @ theta - len(theta) * np.log(TAU) + logdet) / 2
    np.testing.assert_allclose(posterior.log_evidence(0.7), want, rtol=1e-9)


def test_the_best_prior_precision_is_that_of_the_evidence(x64):
    """`gamma = prior_precision |mean|^2` with `gamma = sum lambda / (lambda + prior_precision)`."""
    posterior, params, _, (a, g) = mlp()
    blocks = oracles.block_diagonal(oracles.kronecker_fisher(a, g), oracles.block_sizes(a, g))
    values = np.maximum(np.linalg.eigvalsh(N * blocks), 0)
    best = posterior.with_best_prior_precision()
    tau, theta = float(best.prior_precision), oracles.flatten(params)
    np.testing.assert_allclose(np.sum(values / (values + tau)), tau * theta @ theta, rtol=1e-3)
    for other in (0.8 * tau, 1.25 * tau):
        assert posterior.with_prior_precision(other).log_evidence(0.0) < best.log_evidence(0.0)
    np.testing.assert_allclose(
        posterior.with_best_prior_precision(100.0, 1000.0).prior_precision, 100.0, rtol=1e-3
    )


def test_factored_damping_follows_the_prior(x64):
    posterior, params, _, (a, g) = mlp(ko.kronecker("cholesky"))
    for tau in (TAU, 2.0):
        dense = np.linalg.inv(N * oracles.factored_tikhonov(a, g, tau / N))
        got = covariance_of(posterior.with_prior_precision(tau), params)
        np.testing.assert_allclose(got, dense, rtol=1e-7, atol=1e-9)


def test_ekfac_measures_its_moments_in_the_basis_of_all_the_data(x64):
    x = oracles.normal(1, (N, 3))
    posterior, params, _, (a, g) = mlp(ko.ekfac_block(), batches=iter([(x[:3],), (x[3:],)]))
    exact, kronecker = oracles.exact_fisher(a, g), oracles.kronecker_fisher(a, g)
    got, start = covariance_of(posterior, params), 0
    for size in oracles.block_sizes(a, g):
        mine = slice(start, start + size)
        start += size
        inverse = np.linalg.inv(got[mine, mine])
        # the moments are the diagonal of the exact block in an eigenbasis of the Kronecker one
        trace = np.trace(exact[mine, mine])
        np.testing.assert_allclose(np.trace(inverse), N * trace + size * TAU, rtol=1e-8)
        commutes = inverse @ kronecker[mine, mine]
        np.testing.assert_allclose(commutes, commutes.T, atol=1e-7 * np.abs(commutes).max())


def test_weights_count_as_so_many_examples(x64):
    """Padding of weight zero is no example, wherever it stands."""

    def predict(p, x, w):
        return ko.Categorical(oracles.forward(p, x)[0], w)

    params, x = oracles.make_params(0, (3, 2)), oracles.normal(1, (5, 3))
    ones, padding = jnp.ones(3), jnp.asarray([1.0, 1.0, 0.0])
    padded = jnp.concatenate([x[3:], jnp.full((1, 3), jnp.nan)])
    estimator = ko.ggn(predict)
    got = ko.laplace(estimator, params, [(x[:3], ones), (padded, padding)])
    want = ko.laplace(estimator, params, [(x, jnp.ones(5))])
    assert float(got.size) == 5
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-10, atol=1e-12),
        got.measured.statistics,
        want.measured.statistics,
    )


@pytest.mark.parametrize("likelihood", [ko.Categorical, ko.Bernoulli])
def test_averages_over_draws_are_means_of_probabilities(likelihood):
    """Against draws of the outputs that are made here."""
    params, x = {"w": jnp.ones((2, 2))}, jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    estimator = ko.ggn(lambda p, x: likelihood(ko.tap_dense(x @ p["w"], x, p["w"])))
    posterior = ko.laplace(estimator, params, [(x,)], prior_precision=0.5)
    drawn, outputs, probit = jax.jit(
        lambda posterior, key: (
            posterior.predict(x, approximation="sample", key=key, samples=20_000),
            posterior.outputs(x),
            posterior.predict(x),
        )
    )(posterior, jax.random.key(0))
    rng = np.random.default_rng(0)
    pairs = zip(np.asarray(outputs.mean), np.asarray(outputs.covariance), strict=True)
    f = np.stack([rng.multivariate_normal(m, c, 20_000) for m, c in pairs])
    squash = jax.nn.softmax if likelihood is ko.Categorical else jax.nn.sigmoid
    np.testing.assert_allclose(squash(drawn.logits), squash(f).mean(1), atol=0.015)
    np.testing.assert_allclose(
        squash(probit.logits), squash(drawn.logits), atol=0.06
    )  # probit's own error


def free(p, x):
    return ko.Normal(ko.tap_dense(x @ p["w"], x, p["w"]) + jnp.sinh(jnp.arcsinh(p["free"])))


def test_what_no_block_covers_is_fixed():
    params, x = {"w": jnp.ones((2, 1)), "free": jnp.ones(1)}, jnp.eye(2)
    estimator = ko.ggn(free)
    with pytest.raises(ValueError, match="uncovered='raise' and no block covers\n  free"):
        ko.laplace(estimator, params, [(x,)])
    posterior = ko.laplace(estimator, params, [(x,)], uncovered="pass")
    draws = posterior.sample(jax.random.key(0), 3)
    np.testing.assert_array_equal(draws["free"], np.ones((3, 1)))
    assert jnp.abs(draws["w"] - 1).min() > 0
    assert float(posterior.inverse_product(params)["free"][0]) == 0
    np.testing.assert_allclose(posterior.outputs(x).covariance.ravel(), [0.5, 0.5], rtol=1e-5)


def test_errors():
    problem = h.plain_problem()
    estimator, params, batches = problem.estimator, problem.params, [(problem.x,)]
    with pytest.raises(ValueError, match="laplace: got no batch"):
        ko.laplace(estimator, params, [])
    with pytest.raises(
        ValueError, match="laplace: prior_precision=0; expected prior_precision > 0"
    ):
        ko.laplace(estimator, params, batches, prior_precision=0)
    with pytest.raises(ValueError, match="batch 1 gives statistics that are not finite"):
        ko.laplace(estimator, params, [*batches, (problem.x * jnp.nan,)])
    with pytest.raises(ValueError, match="forward_only measures inputs of layers only"):
        ko.laplace(ko.forward_only(problem.predict), params, batches)
    with pytest.raises(ValueError, match="no mean of second moments over the data"):
        ko.laplace(estimator, params, batches, block=ko.rank_one())
    posterior = ko.laplace(estimator, params, batches)
    with pytest.raises(ValueError, match="approximation='mc'; expected one of 'probit', 'sample'"):
        posterior.predict(problem.x, approximation="mc")
    with pytest.raises(ValueError, match="got key=None with approximation='sample'"):
        posterior.predict(problem.x, approximation="sample")
    losses = ko.empirical_fisher(lambda p, x: problem.predict(p, x).nll(problem.y))
    with pytest.raises(TypeError, match="empirical_fisher knows losses only"):
        dataclasses.replace(posterior, spec=losses.spec).outputs(problem.x)
    no_root = ko.kronecker()._replace(name="mine", root_solve=None)
    buckets = tuple(bucket._replace(block=no_root) for bucket in posterior.buckets)
    with pytest.raises(ValueError, match="Posterior.sample: layer 'first' has block 'mine'"):
        dataclasses.replace(posterior, buckets=buckets).sample(jax.random.key(0))
