"""Power iterations on the rearranged Fisher block against its dense singular value decomposition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._types import Average, Use
from kfac_optax.blocks.kronecker.kpsvd import kpsvd_block
from kfac_optax.blocks.kronecker.kpsvd_terms import unit
from kfac_optax.blocks.kronecker.kpsvd_two import kpsvd_two_block
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.blocks.kronecker.tkfac import tkfac_block
from tests import helpers as h
from tests import oracles
from tests.blocks import test_ekfac as of_ekfac

N, T, P, Q = 7, 3, 4, 3
LAM = 0.25
ONE, TWO, CORRECTED = (
    kpsvd_block(),
    kpsvd_two_block(floor=1e-3),
    kpsvd_two_block("kfac", floor=1e-3),
)


def rows(t=None, seed=0, p=P, q=Q):
    """Rows with moments that are not alike, so that singular values are apart."""
    shape = (N,) if t is None else (N, t)
    scale = jnp.linspace(1.5, 0.3, p), jnp.linspace(0.5, 1.5, q)
    return tuple(s * oracles.normal(seed + i, (*shape, len(s))) + 0.3 for i, s in enumerate(scale))


@functools.partial(jax.jit, static_argnums=0)
def followed(block, a, g, steps=120, decay=0.0):
    """The statistic and the inverse after some statistics of one batch."""
    layer = ko.testing.dense_layer(a.shape[-1], g.shape[-1])
    use = Use(layer, len(a), a[..., 0].size, a.dtype)

    def step(k, carry):
        statistic, inverse = carry
        new, _ = block.measure(a, g, use, inverse)
        e = jnp.minimum(1 - 1 / (k + 1.0), decay)
        statistic = jax.tree.map(lambda x, y: e * x + (1 - e) * y, statistic, new)
        inverse = block.absorb(inverse, (), statistic, LAM, Average(e, k, decay))
        return statistic, inverse

    start = block.init(layer, a.dtype)
    carry = start, block.factorize(start, LAM)
    statistic, inverse = jax.lax.fori_loop(0, steps, step, carry)
    return statistic, block.refresh(inverse, statistic, LAM, 0)


def exact(a, g):
    """The block `[p q, p q]`, and the same rearranged, `[p p, q q]`."""
    d = np.einsum("n...p,n...q->npq" if a.ndim == 2 else "ntp,ntq->npq", a, g)
    n, p, q = d.shape
    fisher = np.einsum("npq,nrs->pqrs", d, d) / n
    return fisher.reshape(p * q, p * q), fisher.transpose(0, 2, 1, 3).reshape(p * p, q * q)


def dense(block, statistic, p=P, q=Q):
    return oracles.matrix_of(lambda v: block.multiply(statistic, v), p, q).T


def left_over(a, g, terms):
    """Root of the sum of squares of all singular values but the first."""
    return np.sqrt(np.sum(np.linalg.svd(exact(a, g)[1])[1][terms:] ** 2))


@pytest.mark.parametrize("t", [None, T])
def test_the_error_is_that_of_the_singular_value_decomposition(x64, t):
    a, g = rows(t)
    statistic, _ = followed(ONE, a, g)
    error = np.linalg.norm(exact(a, g)[0] - dense(ONE, statistic))
    np.testing.assert_allclose(error, left_over(a, g, 1), rtol=1e-8)
    sigma = np.linalg.svd(exact(a, g)[1])[1][0]
    np.testing.assert_allclose(statistic.scale, sigma, rtol=1e-10)
    for factor in (statistic.inputs, statistic.outputs):
        assert np.linalg.eigvalsh(factor).min() > -1e-12 * sigma


@pytest.mark.parametrize("t", [None, T])
def test_two_terms_are_the_two_leading_ones(x64, t):
    a, g = rows(t)
    statistic, _ = followed(TWO, a, g)
    error = np.linalg.norm(exact(a, g)[0] - dense(TWO, statistic))
    np.testing.assert_allclose(error, left_over(a, g, 2), rtol=1e-6)
    assert error < 0.9 * left_over(a, g, 1)


def test_the_correction_is_the_leading_term_of_what_kfac_leaves(x64):
    a, g = rows()
    fisher = exact(a, g)[0]
    statistic, _ = followed(CORRECTED, a, g)
    kfac = np.kron(a.T @ a / N, g.T @ g / N)
    rest = (fisher - kfac).reshape(P, Q, P, Q).transpose(0, 2, 1, 3).reshape(P * P, Q * Q)
    want = np.sqrt(np.sum(np.linalg.svd(rest)[1][1:] ** 2))
    error = np.linalg.norm(fisher - dense(CORRECTED, statistic))
    np.testing.assert_allclose(error, want, rtol=1e-6)
    assert error < 0.9 * np.linalg.norm(fisher - kfac)


@pytest.mark.parametrize("t", [None, T])
def test_the_first_statistic_is_tkfac(x64, t):
    a, g = rows(t)
    statistic, _ = followed(ONE, a, g, steps=1)
    other = tkfac_block(sharing="exact")
    use = Use(ko.testing.dense_layer(P, Q), N, N * (t or 1), a.dtype)
    want = dense(other, other.measure(a, g, use))
    np.testing.assert_allclose(dense(ONE, statistic), want, rtol=1e-10)


def test_averaged_statistics_find_the_same(x64):
    """As fast as the average forgets where it started."""
    a, g = rows()
    for block, terms, rtol in ((ONE, 1, 1e-7), (TWO, 2, 1e-4)):
        statistic, _ = followed(block, a, g, steps=600, decay=0.9)
        error = np.linalg.norm(exact(a, g)[0] - dense(block, statistic))
        np.testing.assert_allclose(error, left_over(a, g, terms), rtol=rtol)


@pytest.mark.parametrize("inverse", ["eigh", "cholesky"])
def test_the_solve_of_one_term_is_that_of_its_product(x64, inverse):
    a, g = rows()
    block = ONE if inverse == "eigh" else kpsvd_block(inverse)
    statistic, kept = followed(block, a, g, steps=3)
    v = oracles.normal(5, (P, Q))
    product = ko.kronecker(inverse)
    root = jnp.sqrt(statistic.scale)
    factors = Factors(statistic.inputs / root, statistic.outputs / root)
    want = product.solve(product.factorize(factors, LAM), v, LAM)
    np.testing.assert_allclose(block.solve(kept, v, LAM), want, rtol=1e-10)


@pytest.mark.parametrize("first", ["svd", "kfac"])
def test_the_solve_of_two_terms_is_the_damped_inverse(x64, first):
    """As long as the sum is above the floor in all directions."""
    a, g = rows()
    block = TWO if first == "svd" else CORRECTED
    statistic, kept = followed(block, a, g, steps=40)
    leading = statistic.first
    outputs = leading.outputs / (leading.scale if first == "svd" else 1)
    total = dense(block, statistic)
    pi = np.sqrt(np.trace(leading.inputs) / P / (np.trace(outputs) / Q))
    x, y = pi * np.sqrt(LAM), np.sqrt(LAM) / pi
    shifts = np.kron(leading.inputs, y * np.eye(Q)) + np.kron(x * np.eye(P), outputs)
    damped = total + shifts + x * y * np.eye(P * Q)
    assert np.linalg.eigvalsh(damped).min() > 0
    v = oracles.normal(5, (P, Q))
    want = np.linalg.solve(damped, np.ravel(v))
    np.testing.assert_allclose(np.ravel(block.solve(kept, v, LAM)), want, rtol=1e-8)


@pytest.mark.parametrize("block", [ONE, TWO], ids=["one", "two"])
def test_one_example_is_exact_and_has_no_second_term(x64, block):
    a, g = (x[:1] for x in rows())
    for steps in (1, 2, 3):
        statistic, inverse = followed(block, a, g, steps=steps)
        np.testing.assert_allclose(dense(block, statistic), exact(a, g)[0], atol=1e-12)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(inverse))


def test_two_terms_keep_the_laws():
    """Those of statistics and solves; its product may be indefinite."""
    case = ko.testing.dense_case(kpsvd_two_block())
    for check in ("types", "operator", "batch_split", "masked"):
        getattr(ko.testing, f"check_{check}")(case)
    for shape in ((3, 1), (1, 2)):  # where there is no second direction
        ko.testing.check_start_and_zeros(ko.testing.dense_case(TWO, *shape))


@pytest.mark.parametrize("kind", ["convolution", "uses"])
def test_every_kind_of_layer_is_approached_through_the_engine(x64, kind):
    """The error after some statistics is next to the least possible."""
    predict, params, x = of_ekfac.problem(kind)
    estimator, block = ko.ggn(predict), ONE
    layers = estimator.layers(params, x)
    tx = ko.scale_by_curvature(layers, block=block, curvature_every=1, decay=0.0)

    @jax.jit
    def run(state):
        def step(state, _):
            return tx.update(params, state, params, curvature=estimator.at(params, x))[1], None

        return jax.lax.scan(step, state, length=60)[0]

    state = run(tx.init(params))
    for layer in layers:
        p, q = layer.shape
        (name,) = [n for n in state.factors if f"{p}x{q}" in n]
        fisher = oracles.dense_block(estimator, params, (x,), layer)
        fisher = fisher.reshape(layer.copies, p * q, layer.copies, p * q)
        for k in range(layer.copies):
            mine = fisher[k, :, k].reshape(p, q, p, q)
            values = np.linalg.svd(mine.transpose(0, 2, 1, 3).reshape(p * p, q * q))[1]
            got = dense(block, jax.tree.map(lambda x, k=k: x[k], state.factors[name]), p, q)
            error = np.linalg.norm(mine.reshape(p * q, p * q) - got)
            least = np.sqrt(np.sum(values[1:] ** 2))
            assert error < least + 1e-4 * values[0], layer.path


@functools.cache
def trained():
    """Rows of every layer of a net after training: `a [n, p]`, `g [n, q]`, one for each class."""
    with jax.enable_x64(True):
        params = oracles.make_params(0, (4, 4, 4))
        x = oracles.normal(1, (20, 4))
        labels = jnp.argmax(x**2, 1)

        def loss(params):
            return ko.Categorical(oracles.forward(params, x, tapped=False)[0]).mean_nll(labels)

        tx = optax.adam(0.05)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=60)[0][0])
        params = run(params)
        logits = oracles.forward(params, x, tapped=False)[0]
        y = jax.nn.softmax(logits)
        # columns of a square root of diag(y) - y y^T
        root = jax.vmap(jnp.diag)(jnp.sqrt(y)) - y[:, :, None] * jnp.sqrt(y)[:, None, :]
        a, g = oracles.per_example(params, x, jnp.moveaxis(root, 2, 0))
        # a row for each class and example, so that a mean over rows is the sum over classes
        return [(np.tile(ai, (4, 1)), 2 * gi.reshape(80, -1)) for ai, gi in zip(a, g)]


def distances(a, g):
    """Frobenius distances to the exact block, relative to its norm."""
    n, (p, q) = len(a), (a.shape[1], g.shape[1])
    fisher = exact(a, g)[0]
    kron = {"kfac": (a.T @ a / n, g.T @ g / n)}
    size_a, size_g = (a**2).sum(1), (g**2).sum(1)
    kron["tkfac"] = a.T @ (size_g[:, None] * a) / n, g.T @ (size_a[:, None] * g) / n
    kron["tkfac"] = kron["tkfac"][0] / np.mean(size_a * size_g), kron["tkfac"][1]
    found = {name: np.kron(*factors) for name, factors in kron.items()}
    for plain, name in (("kfac", "ekfac"), ("tkfac", "tekfac")):
        left, right = (np.linalg.eigh(x)[1] for x in kron[plain])
        basis = np.kron(left, right)
        found[name] = (basis * np.diag(basis.T @ fisher @ basis)) @ basis.T
    blocks = {"kpsvd": ONE, "two terms": TWO, "corrected": CORRECTED}
    for name, block in blocks.items():
        statistic, _ = followed(block, jnp.asarray(a), jnp.asarray(g), steps=200)
        found[name] = dense(block, statistic, p, q)
    return {k: np.linalg.norm(fisher - m) / np.linalg.norm(fisher) for k, m in found.items()}


def test_distances_on_a_trained_net_are_in_order(x64):
    for a, g in trained():
        d = distances(a, g)
        assert d["ekfac"] < d["kfac"], d
        assert d["tekfac"] < d["tkfac"], d
        assert d["kpsvd"] < min(d["kfac"], d["tkfac"], d["ekfac"]), d
        assert d["two terms"] < min(d["kpsvd"], d["corrected"]), d
        assert d["corrected"] < d["kfac"], d


def test_directions_stay_where_a_product_vanishes_or_overflows():
    old = jnp.eye(2) / jnp.sqrt(2)
    for x in (jnp.zeros((2, 2)), jnp.full((2, 2), 1e30)):
        np.testing.assert_array_equal(unit(x, old), old)
    np.testing.assert_allclose(unit(3 * jnp.eye(2), old), old, rtol=1e-6)


def test_words_of_the_preset():
    layers = h.plain_problem().layers
    with pytest.raises(ValueError, match="rank=3; expected 1 or 2"):
        ko.kpsvd(layers, kl_clip=None, rank=3)
    with pytest.raises(ValueError, match="first='kfac', which has no effect beside rank=1"):
        ko.kpsvd(layers, kl_clip=None, first="kfac")
    with pytest.raises(ValueError, match="inverse='cholesky', which has no effect beside rank=2"):
        ko.kpsvd(layers, kl_clip=None, rank=2, inverse="cholesky")
    state = ko.kpsvd(layers, kl_clip=None, rank=2, first="kfac").init(h.plain_params())
    (factors,) = state.preconditioner.factors.values()
    assert isinstance(factors.first, Factors)


def test_errors():
    with pytest.raises(ValueError, match="'eigh', 'cholesky'"):
        kpsvd_block("svd")
    with pytest.raises(ValueError, match="'svd', 'kfac'"):
        kpsvd_two_block("ekfac")
    with pytest.raises(ValueError, match="floor=0"):
        kpsvd_two_block(floor=0)
    forward = ko.forward_only(h.plain_predict)
    params, x = h.plain_params(), oracles.normal(0, (8, 4))
    tx = ko.scale_by_curvature(forward.layers(params, x), block=kpsvd_block())
    with pytest.raises(ValueError, match="kpsvd_block: needs output gradients"):
        tx.update(params, tx.init(params), params, curvature=forward.at(params, x))
