"""Embedding blocks against the dense block on one-hot inputs and against exact curvature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax._types import Use
from kfac_optax.blocks.embedding.embedding import embedding
from kfac_optax.blocks.embedding.tied_embedding import tied_embedding
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.testing import dense_layer
from tests import oracles

VOCABULARY, FEATURES, N, R = 5, 3, 4, 2
INVERSES = ("eigh", "cholesky")
dense = functools.partial(oracles.matrix_of, p=VOCABULARY, q=FEATURES)


def make_use(rows=N * R, weights=None):
    return Use(dense_layer(VOCABULARY, FEATURES), N, rows, jnp.float64, weights)


def data(seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (N, R)))
    return tokens, jnp.asarray(rng.normal(size=(N, R, FEATURES)))


def one_hot(tokens):
    return jax.nn.one_hot(tokens, VOCABULARY, dtype=jnp.float64)


def tied_data(seed=0):
    tokens, g = data(seed)
    h, d = (
        oracles.normal(seed + 10, (N, R + 1, FEATURES)),
        oracles.normal(seed + 11, (N, R + 1, VOCABULARY)),
    )
    return tokens, g, h, d


def weights(rows):
    w = np.random.default_rng(7).uniform(0.5, 2, (N, rows))
    w[0] = 0
    return jnp.asarray(w / w.mean())


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("w", [None, R])
def test_embedding_is_the_dense_block_on_one_hot_inputs(inverse, w, x64):
    tokens, g = data()
    use = make_use(weights=None if w is None else weights(w))
    block, full = embedding(inverse), kronecker(inverse)
    factors, reference = block.measure(tokens, g, use), full.measure(one_hot(tokens), g, use)
    np.testing.assert_allclose(np.diag(factors.counts), reference.inputs, atol=1e-12)
    np.testing.assert_allclose(factors.outputs, reference.outputs, atol=1e-12)
    v, lam = oracles.normal(1, (VOCABULARY, FEATURES)), jnp.asarray(0.3)
    got = block.solve(block.factorize(factors, lam), v, lam)
    np.testing.assert_allclose(
        got, full.solve(full.factorize(reference, lam), v, lam), rtol=1e-10, atol=1e-10
    )
    np.testing.assert_allclose(
        block.multiply(factors, v), full.multiply(reference, v), rtol=1e-10, atol=1e-10
    )


def test_embedding_forward_only(x64):
    tokens, _ = data()
    uses = [embedding().measure(tokens, None, make_use(rows=2 * N * R)) for _ in range(2)]
    total = jax.tree.map(jnp.add, *uses)
    np.testing.assert_allclose(total.outputs, np.eye(FEATURES))
    np.testing.assert_allclose(total.counts.sum(), 2 * R)


def test_embedding_is_exact_for_a_gaussian_lookup(x64):
    tokens, _ = data()
    total = None
    for column in np.eye(FEATURES):
        part = embedding().measure(tokens, jnp.broadcast_to(column, (N, R, FEATURES)), make_use())
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    factors = total._replace(counts=total.counts / FEATURES)  # inputs were measured once per column

    def loss(table):
        return jnp.sum(jnp.square(table.reshape(VOCABULARY, FEATURES)[tokens])) / 2 / N

    exact = jax.hessian(loss)(jnp.zeros(VOCABULARY * FEATURES))
    np.testing.assert_allclose(dense(lambda v: embedding().multiply(factors, v)), exact, atol=1e-10)


def test_tokens_beyond_the_vocabulary_are_not_counted(x64):
    tokens = jnp.array([0, VOCABULARY, 2, 2])
    counts = embedding().measure(tokens, jnp.ones((4, FEATURES)), make_use(rows=4)).counts
    np.testing.assert_allclose(counts, [0.25, 0, 0.5, 0, 0])


def kfc_terms(tokens, g, h, d, w=None, v=None):
    """Both terms as matrices, each with its own rows, from the dense block."""
    first = kronecker().measure(one_hot(tokens), g, make_use(rows=g[..., 0].size, weights=w))
    swapped = Use(dense_layer(FEATURES, VOCABULARY), N, h[..., 0].size, jnp.float64, v)
    second = kronecker().measure(h, d, swapped)  # the head is a dense layer with kernel [q, p]
    return (first.inputs, first.outputs), (jnp.diag(jnp.diag(second.outputs)), second.inputs)


@pytest.mark.parametrize("weighted", [False, True])
def test_tied_terms_have_the_scale_of_the_dense_block(weighted, x64):
    tokens, g, h, d = tied_data()
    w, v = (weights(R), weights(R + 1)) if weighted else (None, None)
    rows = N * (2 * R + 1)
    block = tied_embedding()
    broken = h if v is None else jnp.where(v[..., None] == 0, jnp.nan, h)
    parts = block.measure(tokens, g, make_use(rows, w)), block.measure(broken, d, make_use(rows, v))
    factors = jax.tree.map(jnp.add, *parts)
    terms = kfc_terms(tokens, g, h, d, w, v)
    expected = sum(np.kron(a, b) for a, b in terms)
    np.testing.assert_allclose(dense(lambda x: block.multiply(factors, x)), expected, atol=1e-10)


def test_tied_scale_holds_for_several_uses(x64):
    """Two look-ups of different length and two heads are each one KFC term over all their rows."""
    (t1, g1, h1, d1), (t2, g2, h2, d2) = tied_data(0), tied_data(5)
    t2, g2 = t2[:, :1], g2[:, :1]
    rows = N * (R + 1 + 2 * (R + 1))
    block = tied_embedding()
    parts = [
        block.measure(a, g, make_use(rows)) for a, g in ((t1, g1), (t2, g2), (h1, d1), (h2, d2))
    ]
    factors = jax.tree.map(lambda *x: sum(x), *parts)
    joined = [jnp.concatenate(x, 1) for x in ((t1, t2), (g1, g2), (h1, h2), (d1, d2))]
    expected = sum(np.kron(a, b) for a, b in kfc_terms(*joined))
    np.testing.assert_allclose(dense(lambda x: block.multiply(factors, x)), expected, atol=1e-10)


def test_tied_is_exact_for_gaussian_outputs(x64):
    """Squared errors of looked-up rows and of the head's outputs, per position: both KFC terms are
    the Hessian.
    """
    tokens, _, h, _ = tied_data()
    block, rows = tied_embedding(), N * (2 * R + 1)
    lookups = [
        block.measure(tokens, jnp.broadcast_to(c, (N, R, FEATURES)), make_use(rows))
        for c in np.eye(FEATURES)
    ]
    heads = [
        block.measure(h, jnp.broadcast_to(c, (N, R + 1, VOCABULARY)), make_use(rows))
        for c in np.eye(VOCABULARY)
    ]
    factors = jax.tree.map(lambda *x: sum(x), *lookups, *heads)
    # what comes from inputs was measured once per column: counts of tokens, moments of h and both
    # shares
    factors = factors._replace(
        lookup_counts=factors.lookup_counts / FEATURES,
        lookup_share=factors.lookup_share / FEATURES,
        head_inputs=factors.head_inputs / VOCABULARY,
        head_share=factors.head_share / VOCABULARY,
        head_counts=factors.head_counts,
    )

    def loss(flat):
        table = flat.reshape(VOCABULARY, FEATURES)
        return (jnp.sum(jnp.square(table[tokens])) + jnp.sum(jnp.square(h @ table.T))) / 2 / N

    exact = jax.hessian(loss)(jnp.zeros(VOCABULARY * FEATURES))
    np.testing.assert_allclose(dense(lambda v: block.multiply(factors, v)), exact, atol=1e-10)


def factored(a, g, damping):
    pi, root = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g))), np.sqrt(damping)
    return np.kron(a + pi * root * np.eye(len(a)), g + root / pi * np.eye(len(g)))


@pytest.mark.parametrize("inverse", INVERSES)
def test_tied_solve_inverts_the_sum_of_damped_terms(inverse, x64):
    tokens, g, h, d = tied_data()
    block, rows = tied_embedding(inverse), N * (2 * R + 1)
    factors = jax.tree.map(
        jnp.add, block.measure(tokens, g, make_use(rows)), block.measure(h, d, make_use(rows))
    )
    lam = jnp.asarray(0.2)
    expected = sum(
        factored(np.asarray(a), np.asarray(b), 0.1) for a, b in kfc_terms(tokens, g, h, d)
    )
    inverse = block.factorize(factors, lam)
    np.testing.assert_allclose(
        dense(lambda v: block.solve(inverse, v, lam)),
        np.linalg.inv(expected),
        rtol=1e-9,
        atol=1e-10,
    )


@pytest.mark.parametrize("kind", ["lookup", "head"])
def test_tied_with_one_sort_of_use_only(kind, x64):
    tokens, g, h, d = tied_data()
    block = tied_embedding()
    a, b = (tokens, g) if kind == "lookup" else (h, d)
    factors = block.measure(a, b, make_use(rows=b[..., 0].size))
    lam = jnp.asarray(0.2)
    term = kfc_terms(tokens, g, h, d)[kind == "head"]
    expected = np.linalg.inv(
        factored(*map(np.asarray, term), 0.1) + 0.1 * np.eye(VOCABULARY * FEATURES)
    )
    inverse = block.factorize(factors, lam)
    np.testing.assert_allclose(
        dense(lambda v: block.solve(inverse, v, lam)), expected, rtol=1e-9, atol=1e-10
    )


def test_tied_forward_only(x64):
    tokens, _, h, _ = tied_data()
    block, rows = tied_embedding(), N * (2 * R + 1)
    parts = block.measure(tokens, None, make_use(rows)), block.measure(h, None, make_use(rows))
    factors = jax.tree.map(jnp.add, *parts)
    expected = np.kron(np.diag(np.asarray(one_hot(tokens).sum((0, 1)) / N)), np.eye(FEATURES))
    expected += np.kron(np.eye(VOCABULARY), np.einsum("nri,nrj->ij", h, h) / N)
    np.testing.assert_allclose(dense(lambda v: block.multiply(factors, v)), expected, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="expected one of 'eigh', 'cholesky'"):
        embedding("svd")
    with pytest.raises(ValueError, match="expected one of 'eigh', 'cholesky'"):
        tied_embedding("svd")
    use = Use(dense_layer(VOCABULARY, FEATURES), 2, 2, jnp.float32)
    with pytest.raises(ValueError, match="expected integer tokens"):
        embedding().measure(jnp.ones((2, 3)), jnp.ones((2, 3)), use)
    with pytest.raises(ValueError, match="has a bias"):
        biased = use._replace(layer=dense_layer(VOCABULARY, FEATURES, bias=True))
        embedding().measure(jnp.zeros(2, int), jnp.ones((2, 3)), biased)
    with pytest.raises(ValueError, match="logits of size 4; expected 3 and 5"):
        tied_embedding().measure(jnp.ones((2, 3)), jnp.ones((2, 4)), use)
