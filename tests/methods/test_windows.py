"""GGT, M-FAC and TONGA against dense matrices of the gradients they have seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax.methods.gradient import psgd_fit
from kfac_optax.methods.gradient.window import empty_window, put
from tests.methods import gradient_cases as c

D = 6
GRADIENTS = np.random.default_rng(0).normal(size=(9, D))


def trees(vectors):
    """Vectors as trees of a matrix, a vector and a scalar."""
    return [{"w": v[:4].reshape(2, 2), "b": v[4:5], "s": v[5]} for v in vectors]


def vectors_of(updates):
    names = ("w", "b", "s")
    return [np.concatenate([np.ravel(update[name]) for name in names]) for update in updates]


def of_spectrum(matrix, function):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * function(np.maximum(values, 0))) @ vectors.T


@functools.cache
def ggt_case(mode):
    words = dict(window=4, eps=0.3, b1=0.8, b2=0.9)
    with jax.enable_x64(True):
        return words, vectors_of(c.run(ko.ggt(mode=mode, **words), trees(GRADIENTS))[0])


def ggt_oracle(t, function, window, eps, b1, b2):
    """`function` of the singular values, of the dense matrix `(G G^T)^{1/2}`."""
    ages = np.arange(min(window, t + 1))
    columns = np.stack([b2 ** (age / 2) * GRADIENTS[t - age] for age in ages], axis=1)
    weights = b1**ages
    v = columns @ (weights / weights.sum())
    return of_spectrum(columns @ columns.T, lambda s: function(np.sqrt(s), eps)) @ v


FUNCTIONS = {
    "full": lambda s, eps: 1 / (s + eps),
    "pinv": lambda s, eps: np.where(s > eps, 1 / np.maximum(s, eps), 0),
}


@pytest.mark.parametrize("mode", FUNCTIONS)
def test_ggt_is_the_dense_root(mode):
    words, updates = ggt_case(mode)
    for t, update in enumerate(updates):
        expected = ggt_oracle(t, FUNCTIONS[mode], **words)
        np.testing.assert_allclose(update, expected, rtol=1e-9, atol=1e-11)


def test_ggt_turns_with_the_parameters():
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    words, updates = ggt_case("full")
    with jax.enable_x64(True):
        turned, _ = c.run(ko.ggt(**words), trees(GRADIENTS @ turn.T))
    for got, update in zip(vectors_of(turned), updates, strict=True):
        np.testing.assert_allclose(got, turn @ update, rtol=1e-9, atol=1e-11)


def test_ggt_of_one_gradient_is_the_normalised_gradient(x64):
    updates, _ = c.run(ko.ggt(window=1, eps=0.5, b1=0.0, b2=0.0), trees(GRADIENTS))
    for got, g in zip(vectors_of(updates), GRADIENTS, strict=True):
        np.testing.assert_allclose(got, g / (np.linalg.norm(g) + 0.5), rtol=1e-12)


def test_ggt_over_all_gradients_is_what_psgd_converges_to(x64):
    """The full-matrix root up to the number of gradients: a window of sums, a mean for PSGD."""
    r = len(GRADIENTS)
    updates, _ = c.run(ko.ggt(window=r, eps=1e-12, b1=0.0), trees(GRADIENTS))
    moment = jnp.asarray(GRADIENTS.T @ GRADIENTS / r)

    def fit(q, _):
        of_h, of_v = q @ moment @ q.T, jnp.linalg.inv(q @ q.T)
        return psgd_fit.moved(q[None], of_h[None], of_v[None], jnp.float64(0.5))[0], None

    q, _ = jax.lax.scan(fit, jnp.eye(D), length=600)
    expected = q.T @ (q @ GRADIENTS[-1]) / np.sqrt(r)
    np.testing.assert_allclose(vectors_of(updates)[-1], expected, rtol=1e-6)


def test_mfac_is_the_dense_inverse(x64):
    """Also where the ring is not full yet, and where it has been filled more than once."""
    m, lam = 4, 1e-3
    updates, state = c.run(ko.mfac(window=m, damping=lam), trees(GRADIENTS))
    for t, (got, g) in enumerate(zip(vectors_of(updates), GRADIENTS, strict=True)):
        rows = GRADIENTS[max(0, t - m + 1) : t + 1]
        fisher = rows.T @ rows / len(rows) + lam * np.eye(D)
        np.testing.assert_allclose(got, np.linalg.solve(fisher, g), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(state.held.gram, state.held.rows @ state.held.rows.T, rtol=1e-12)


def test_mfac_in_single_precision():
    """At the paper's damping: the Gram matrix of the gradients has to be inverted, no more."""
    m, lam = 4, 1e-5
    updates, _ = c.run(ko.mfac(window=m, damping=lam), trees(GRADIENTS.astype(np.float32)))
    for t, (got, g) in enumerate(zip(vectors_of(updates), GRADIENTS, strict=True)):
        rows = GRADIENTS[max(0, t - m + 1) : t + 1]
        fisher = rows.T @ rows / len(rows) + lam * np.eye(D)
        expected = np.linalg.solve(fisher, g)
        assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)


def test_mfac_of_the_examples_is_the_batch_natural_gradient(x64):
    """The rows of a batch in the window: the same as `smw` with the examples' own gradients."""
    x = np.random.default_rng(2).normal(size=(5, 3))
    y = np.random.default_rng(3).normal(size=(5, 2))
    w = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2)))

    def losses(w, x, y):
        return ko.Normal(jnp.tanh(x @ w)).nll(y)

    def loss(w, x, y):
        return losses(w, x[None], y[None])[0]

    rows = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(w, x, y)
    gradient, lam = rows.mean(0), 1e-2
    smw = ko.smw(damping=lam)
    curvature = ko.empirical_fisher(losses).at(w, x, y)
    expected, _ = smw.update(gradient, smw.init(w), w, curvature=curvature)
    tx = ko.mfac(window=5, damping=lam)
    got, state = tx.update(gradient, tx.init(w), per_example_grads=rows)
    np.testing.assert_allclose(got, expected, rtol=1e-8)
    # a part of the window is replaced by the next examples, in their order
    _, state = tx.update(gradient, state, per_example_grads=rows[:2] + 1)
    kept = np.concatenate([rows[:2] + 1, rows[2:]]).reshape(5, -1)
    np.testing.assert_array_equal(state.held.rows, kept)


def test_mfac_says_what_examples_it_takes():
    w = jnp.ones((2, 2))
    tx = ko.mfac(window=2)
    with pytest.raises(ValueError, match=r"3 examples for a window of 2 rows"):
        tx.update(w, tx.init(w), per_example_grads=jnp.ones((3, 2, 2)))
    with pytest.raises(ValueError, match=r"shapes \[\(2, 2\)\]; expected a tree like"):
        tx.update(w, tx.init(w), per_example_grads=w)
    with pytest.raises(ValueError, match="5 entries, but the state keeps rows of 4"):
        tx.update(jnp.ones(5), tx.init(w))


def test_three_forms_of_the_inverse_agree():
    """The Cholesky factor in use, the static recursion and the triangular dynamic form."""
    g, lam = GRADIENTS[:4], 1e-2
    m, x = len(g), GRADIENTS[-1]
    expected = np.linalg.solve(g.T @ g / m + lam * np.eye(D), x)
    # static: F_i^-1 from F_{i-1}^-1 by one rank-one update for each gradient
    v, q = [], []
    for row in g:
        mine = row / lam - sum(a * (a @ row) / b for a, b in zip(v, q, strict=True))
        q.append(m + row @ mine)
        v.append(mine)
    static = x / lam - sum(a * (a @ x) / b for a, b in zip(v, q, strict=True))
    # dynamic: D_ij = g_i F_{i-1}^-1 g_j, upper triangular
    d = g @ g.T / lam
    for i in range(m):
        d[i + 1 :, i + 1 :] -= np.outer(d[i, i + 1 :], d[i, i + 1 :]) / (m + d[i, i])
    b = np.zeros((m, m))
    for i in range(m):
        b[i, i] = 1 / lam
        for j in range(i):
            b[i] -= d[j, i] / (m + d[j, j]) * b[j]
    y = g @ x / lam
    for i in range(1, m):
        y[i:] -= d[i - 1, i:] * y[i - 1] / (m + d[i - 1, i - 1])
    dynamic = x / lam - g.T @ (b.T @ (y / (m + np.diag(d))))
    np.testing.assert_allclose(static, expected, rtol=1e-10)
    np.testing.assert_allclose(dynamic, expected, rtol=1e-10)
    with jax.enable_x64(True):
        inverse = ko.inverse_of_rows(jnp.asarray(g), lam)
        np.testing.assert_allclose(inverse.product(jnp.asarray(x)), expected, rtol=1e-10)
        diagonal = np.diag(np.linalg.inv(g.T @ g / m + lam * np.eye(D)))
        np.testing.assert_allclose(inverse.diagonal(), diagonal, rtol=1e-10)
    with pytest.raises(ValueError, match="inverse_of_rows: damping=0.0; expected damping > 0"):
        ko.inverse_of_rows(jnp.asarray(g), 0.0)


@pytest.mark.parametrize("rank", [1, 2])
def test_tonga_is_the_dense_inverse_of_what_it_keeps(x64, rank):
    block, lam, decay = 3, 0.1, 0.9
    tx = ko.tonga(rank=rank, block=block, damping=lam, decay=decay)
    updates, _ = c.run(tx, trees(GRADIENTS))
    columns = np.zeros((D, 0))
    for got, g in zip(vectors_of(updates), GRADIENTS, strict=True):
        if columns.shape[1] == rank + block:
            u, s, _ = np.linalg.svd(columns, full_matrices=False)
            lost = columns @ columns.T - (u[:, :rank] * s[:rank] ** 2) @ u[:, :rank].T
            columns = u[:, :rank] * s[:rank]
            np.testing.assert_allclose(np.trace(lost), np.sum(s[rank:] ** 2), rtol=1e-12)
        columns = np.concatenate([np.sqrt(decay) * columns, g[:, None]], axis=1)
        expected = np.linalg.solve(columns @ columns.T + lam * np.eye(D), g)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


def test_tonga_without_decay_is_mfac_with_its_damping_by_the_count(x64):
    r, lam = len(GRADIENTS), 0.2
    tonga, _ = c.run(ko.tonga(rank=1, block=r, damping=lam, decay=1.0), trees(GRADIENTS))
    mfac, _ = c.run(ko.mfac(window=r, damping=lambda count: lam / (count + 1)), trees(GRADIENTS))
    for t, (a, b) in enumerate(zip(vectors_of(tonga), vectors_of(mfac), strict=True), 1):
        np.testing.assert_allclose(t * a, b, rtol=1e-6)  # schedules are in single precision
    full, _ = c.run(ko.mfac(window=r, damping=lam / r), trees(GRADIENTS))
    np.testing.assert_allclose(r * vectors_of(tonga)[-1], vectors_of(full)[-1], rtol=1e-10)


def tonga_of(window):
    return ko.tonga(rank=1, block=window - 1, decay=0.5)


@pytest.mark.parametrize("make", [ko.ggt, ko.mfac, tonga_of], ids=["ggt", "mfac", "tonga"])
def test_a_gradient_whose_square_overflows_is_not_kept(make):
    """It would spoil all steps until it leaves the window; and nothing is forgotten for it."""
    huge = trees(1e30 * GRADIENTS)
    good = trees(GRADIENTS)
    updates, state = c.run(make(window=3), [good[0], huge[1], good[2]])
    expected, _ = c.run(make(window=3), [good[0], good[2]])
    np.testing.assert_array_equal(vectors_of(updates)[1], np.zeros(D))
    np.testing.assert_array_equal(vectors_of(updates)[2], vectors_of(expected)[1])
    assert "1 statistics of finite gradients were not finite" in ko.problems(state)[0]


def test_rows_go_round_for_ever():
    """The count of rows stays small, and the places go on in order."""
    window = empty_window(3, jnp.zeros(1), jnp.float32)
    put_in = jax.jit(put)
    for number in range(20):
        window, _ = put_in(window, jnp.full((1, 1), number, jnp.float32), jnp.bool_(True))
    assert sorted(np.ravel(window.rows)) == [17, 18, 19]
    assert int(window.count) < 6


@pytest.mark.parametrize(
    ("make", "words", "error"),
    [
        (ko.ggt, dict(window=0), "ggt: window=0; expected window >= 1"),
        (ko.ggt, dict(eps=0.0), "ggt: eps=0.0"),
        (ko.ggt, dict(mode="half"), "ggt: mode='half'; expected one of 'full', 'pinv'"),
        (ko.mfac, dict(damping=0.0), "mfac: damping=0.0"),
        (ko.tonga, dict(rank=0), "tonga: rank=0"),
        (ko.tonga, dict(decay=1.5), "tonga: decay=1.5"),
    ],
)
def test_wrong_words_raise(make, words, error):
    with pytest.raises(ValueError, match=error):
        make(**words)


def test_a_window_that_is_an_array_says_so():
    with pytest.raises(TypeError, match="mfac: window is an array"):
        ko.mfac(window=jnp.int32(3))
