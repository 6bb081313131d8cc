"""Newton's inverse against NumPy's, and its fall-back to Cholesky."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.linalg import newton
from kfac_optax.linalg.factorize import damped, psd_inverse
from kfac_optax.linalg.newton import newton_inverse
from tests import helpers as h

N, SHIFT = 6, 0.01


def _factor(seed, dtype=np.float64):
    """A factor with eigenvalues from one down to a thousandth."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(N, N)))
    return jnp.asarray(basis * 10.0 ** np.linspace(0, -3, N) @ basis.T, dtype)


def _expected(matrix):
    return np.linalg.inv(np.asarray(matrix, np.float64) + SHIFT * np.eye(N))


STARTS = {
    "near": lambda m: _expected(m + 0.05 * _factor(7)),
    "a tenth": lambda m: 0.1 * _expected(m),
    "twice": lambda m: 2 * _expected(m),
    "of another factor": lambda m: _expected(_factor(8)),
    "identity": lambda m: np.eye(N),
    "huge": lambda m: 1e4 * np.eye(N),
}
BAD = {
    "nan": lambda m: np.full((N, N), np.nan),
    "zero": lambda m: np.zeros((N, N)),
    "minus": lambda m: -_expected(m),
}


@pytest.mark.parametrize("start", STARTS)
def test_equals_the_dense_inverse(start, x64):
    matrix = _factor(0)
    got = newton_inverse(matrix, jnp.float64(SHIFT), jnp.asarray(STARTS[start](matrix)))
    np.testing.assert_allclose(got, _expected(matrix), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize("start", STARTS)
def test_products_alone_find_it(start, x64):
    """The iteration itself, without the factorisation to fall back to."""
    matrix = damped(_factor(0), jnp.float64(SHIFT))
    got, good = newton._iterated(matrix, jnp.asarray(STARTS[start](_factor(0))))
    assert good
    np.testing.assert_allclose(got @ matrix, np.eye(N), atol=1e-12)


@pytest.mark.parametrize("start", BAD)
def test_a_start_that_is_no_inverse_gives_that_of_cholesky(start, x64):
    matrix = _factor(0)
    got = newton_inverse(matrix, jnp.float64(SHIFT), jnp.asarray(BAD[start](matrix)))
    np.testing.assert_array_equal(got, psd_inverse(matrix, jnp.float64(SHIFT)))


def test_single_precision():
    """As close as Cholesky's inverse to that of double precision, up to a factor of ten."""
    matrix, shift = _factor(0, np.float32), jnp.float32(SHIFT)
    start = psd_inverse(matrix + 0.05 * jnp.eye(N), shift)
    newton_error, cholesky_error = (
        np.linalg.norm(x - _expected(matrix)) / np.linalg.norm(_expected(matrix))
        for x in (newton_inverse(matrix, shift, start), psd_inverse(matrix, shift))
    )
    assert newton_error < 10 * cholesky_error + 1e-6


def test_what_is_not_positive_definite_has_none():
    for matrix in (jnp.full((N, N), jnp.nan), -jnp.eye(N)):
        assert not np.isfinite(newton_inverse(matrix, jnp.float32(0.1), jnp.eye(N))).any()


def test_batched_the_factorisation_stands_in_a_branch(x64):
    """One matrix of three has to be factorised; a batch without such runs products alone."""
    matrices = jnp.stack([_factor(i) for i in range(3)])
    starts = jnp.stack([jnp.asarray(_expected(m)) for m in matrices]).at[1].set(-jnp.eye(N))
    batch = jax.jit(jax.vmap(newton_inverse, (0, None, 0)))
    got = batch(matrices, jnp.float64(SHIFT), starts)
    expected = np.stack([_expected(m) for m in matrices])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    # not bit for bit: libraries of accelerators take a stack in another way
    alone = psd_inverse(matrices[1], jnp.float64(SHIFT))
    np.testing.assert_allclose(got[1], alone, rtol=1e-13, atol=1e-13 * np.abs(alone).max())
    jaxpr = jax.make_jaxpr(batch)(matrices, jnp.float64(SHIFT), starts)
    assert "cholesky" in str(jaxpr)
    outside = [e.primitive.name for e in jaxpr.jaxpr.eqns[0].params["jaxpr"].eqns]
    assert "cond" in outside and "cholesky" not in outside


def _trained(inverse, problem):
    options = dict(learning_rate=0.1, damping=0.05, curvature_every=1, inverse_every=2)
    kfac = ko.kfac(problem.layers, inverse=inverse, **options)
    step = jax.jit(h.make_step(kfac, problem))
    params, state = problem.params, jax.jit(kfac.init)(problem.params)
    for _ in range(6):
        params, state, _ = step(params, state)
    return params, state


def test_training_is_that_of_cholesky():
    problem = h.plain_problem()
    params, state = _trained("newton", problem)
    h.assert_close((params, state), _trained("cholesky", problem))
    assert ko.problems(state) == []
    assert "newton" in str(ko.coverage(problem.layers, block=ko.kronecker("newton")))


def test_embeddings_are_inverted_by_cholesky():
    table = ko.testing.dense_layer(3, 2, kind="embedding")
    block = ko.blocks_of(ko.kronecker("newton"), inverse="newton")(table)
    assert block.name == ko.embedding("cholesky").name


def test_injected():
    """Presets take the word as any other."""
    problem = h.plain_problem()
    tx = optax.inject_hyperparams(ko.kfac)(problem.layers, learning_rate=0.1, inverse="newton")
    assert "inverse" not in tx.init(problem.params).hyperparams
