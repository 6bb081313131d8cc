"""Trace-restricted blocks against the exact Fisher block, K-FAC and EKFAC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Use
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.blocks.kronecker.tekfac import tekfac_block
from kfac_optax.blocks.kronecker.tkfac import tkfac_block
from kfac_optax.linalg.rearrangement import contract
from tests import helpers as h
from tests import oracles
from tests.blocks import test_ekfac as of_ekfac

N, T, P, Q = 6, 3, 4, 2
LAM = 0.3
LAYER = ko.testing.dense_layer(P, Q)


def use(rows=N, weights=None):
    return Use(LAYER, N, rows, jnp.float64, weights)


def statistics(estimator, params, args, block):
    """Every layer with the copies of its block's statistic."""
    layers = estimator.layers(params, *args)
    plan = oracles.plan(layers, block=block)
    measured, _ = jax.jit(lambda: estimator.at(params, *args).statistics(plan))()
    return zip(layers, measured, strict=True)


def exact_blocks(estimator, params, args, layer):
    """`[p, q, p, q]` of every copy."""
    p, q = layer.shape
    dense = oracles.dense_block(estimator, params, args, layer)
    dense = dense.reshape(layer.copies, p * q, layer.copies, p * q)
    return [dense[k, :, k].reshape(p, q, p, q) for k in range(layer.copies)]


def check_traces(estimator, params, args, block):
    for layer, (inputs, outputs) in statistics(estimator, params, args, block):
        exact = exact_blocks(estimator, params, args, layer)
        for a, g, f in zip(inputs, outputs, exact, strict=True):
            scale = np.abs(f).max()
            assert scale > 0
            np.testing.assert_allclose(a, np.einsum("iaja->ij", f), atol=1e-10 * scale)
            np.testing.assert_allclose(g, np.einsum("iaib->ab", f), atol=1e-10 * scale)
            np.testing.assert_allclose(np.trace(a), np.einsum("iaia", f), rtol=1e-10)


@pytest.mark.parametrize("sharing", ["expand", "exact"])
def test_both_partial_traces_are_those_of_the_exact_block(x64, sharing):
    predict, params, x = of_ekfac.mlp(6)
    check_traces(ko.ggn(predict), params, (x,), tkfac_block(sharing=sharing))


@pytest.mark.parametrize("kind", ["convolution", "uses", "layers"])
def test_exact_sharing_has_the_traces_of_every_kind_of_layer(x64, kind):
    predict, params, x = of_ekfac.problem(kind)
    check_traces(ko.ggn(predict), params, (x,), tkfac_block(sharing="exact"))


@pytest.mark.parametrize("sharing", ["expand", "exact"])
def test_examples_of_weight_zero_are_never_read(x64, sharing):
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 0.0])
    predict, params, x = of_ekfac.problem("convolution", weights)
    block = tkfac_block(sharing=sharing)
    whole = statistics(ko.ggn(predict), params, (x,), block)
    broken = statistics(ko.ggn(predict), params, (x.at[1].set(jnp.nan),), block)
    for (_, ours), (_, theirs) in zip(whole, broken, strict=True):
        h.assert_close(theirs, ours, rtol=1e-9)
    if sharing == "exact":
        check_traces(ko.ggn(predict), params, (x,), block)


def test_positions_have_the_moments_of_an_example(x64):
    """The form of convolutions, some positions masked with NaN in them."""
    a, g = oracles.normal(0, (N, T, P)), oracles.normal(1, (N, T, Q))
    w = np.random.default_rng(7).uniform(0.5, 2, (N, T))
    w[0], w[1, 2] = 0, 0
    w = jnp.asarray(w / w.mean())
    read = jnp.where(w[..., None] == 0, jnp.nan, a)
    inside = g * jnp.sqrt(w)[..., None]
    got = tkfac_block().measure(read, inside, use(N * T, w))
    want = Factors(np.zeros((P, P)), np.zeros((Q, Q)))
    for ab, gb, wb in zip(np.asarray(a)[1:], np.asarray(g)[1:], np.asarray(w)[1:], strict=True):
        lam = (wb[:, None] * ab).T @ ab
        gam = (wb[:, None] * gb).T @ gb / wb.sum()
        want = Factors(want[0] + np.trace(gam) * lam / N, want[1] + np.trace(lam) * gam / N)
    h.assert_close(got, want, rtol=1e-12)


@pytest.mark.parametrize("inverse", ["eigh", "cholesky"])
def test_of_rows_of_one_length_it_is_kfac(x64, inverse):
    a, g = oracles.normal(0, (N, P)), oracles.normal(1, (N, Q))
    a, g = (3 * x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, g))
    split = {"split": "trace"} if inverse == "cholesky" else {}
    mine, kfac = tkfac_block(inverse, **split), ko.kronecker(inverse)
    statistics = [block.measure(a, g, use()) for block in (mine, kfac)]
    v = oracles.normal(2, (P, Q))
    products = [b.multiply(s, v) for b, s in zip((mine, kfac), statistics, strict=True)]
    np.testing.assert_allclose(*products, rtol=1e-12)
    solved = [
        block.solve(block.factorize(statistic, jnp.asarray(LAM)), v, jnp.asarray(LAM))
        for block, statistic in zip((mine, kfac), statistics, strict=True)
    ]
    np.testing.assert_allclose(*solved, rtol=1e-10)


def test_on_a_deep_linear_net_it_is_kfac_and_exact(x64):
    """Output gradients of a Gaussian then are the same for every input."""
    params, x = oracles.make_params(0, (3, 4, 2)), oracles.normal(1, (5, 3))
    estimator = ko.ggn(lambda p, x: oracles.regressor(p, x, lambda s: s))
    for layer, factors in statistics(estimator, params, (x,), tkfac_block()):
        (exact,) = exact_blocks(estimator, params, (x,), layer)
        got = np.einsum("ij,ab->iajb", factors.inputs[0], factors.outputs[0])
        got = got / np.trace(factors.inputs[0])
        np.testing.assert_allclose(got, exact, atol=1e-10 * np.abs(exact).max())


def test_one_example_is_exact(x64):
    predict, params, x = of_ekfac.mlp(1)
    estimator = ko.empirical_fisher(lambda p, x: predict(p, x).nll(jnp.zeros(len(x), int)))
    for layer, factors in statistics(estimator, params, (x,), tkfac_block()):
        (exact,) = exact_blocks(estimator, params, (x,), layer)
        got = np.einsum("ij,ab->iajb", factors.inputs[0], factors.outputs[0])
        got = got / np.trace(factors.inputs[0])
        np.testing.assert_allclose(got, exact, atol=1e-10 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("inverse", "split"), [("eigh", "even"), ("cholesky", "even"), ("cholesky", "trace")]
)
def test_the_solve_is_the_damped_inverse(x64, inverse, split):
    a, g, v = oracles.normal(0, (N, P)), oracles.normal(1, (N, Q)), oracles.normal(2, (P, Q))
    block = tkfac_block(inverse, split=split)
    factors = block.measure(a, g, use())
    got = block.solve(block.factorize(factors, jnp.asarray(LAM)), v, jnp.asarray(LAM))
    root = np.sqrt(np.trace(factors.inputs))
    left, right = (np.asarray(x) / root for x in factors)
    if inverse == "eigh":
        damped = np.kron(left, right) + LAM * np.eye(P * Q)
    else:
        # the traces are equal: mean eigenvalues are as 1 / P to 1 / Q
        pi = np.sqrt(Q / P) if split == "trace" else 1
        shifts = pi * np.sqrt(LAM), np.sqrt(LAM) / pi
        damped = np.kron(left + shifts[0] * np.eye(P), right + shifts[1] * np.eye(Q))
    np.testing.assert_allclose(np.ravel(got), np.linalg.solve(damped, np.ravel(v)), rtol=1e-9)


def test_contractions_are_those_of_the_exact_block(x64):
    """By products of rows, by gradients of examples and in parts alike."""
    for t, p, q in ((1, 4, 3), (2, 5, 4), (9, 2, 2)):
        a, g = oracles.normal(0, (6, t, p)), oracles.normal(1, (6, t, q))
        m = oracles.normal(2, (q, q))
        m = m + m.T
        d = np.einsum("btp,btq->bpq", a, g)
        want = np.einsum("bpq,qr,bsr->ps", d, m, d)
        for entries in (None, 1, 17):
            np.testing.assert_allclose(contract(a, g, m, entries=entries), want, rtol=1e-9)
        np.testing.assert_allclose(contract(a, g), np.einsum("bpq,bsq->ps", d, d), rtol=1e-9)


def corrected(block):
    """The statistic, the moments after one statistic in its basis, and the inverse."""
    a, g = oracles.normal(0, (N, P)), oracles.normal(1, (N, Q))
    start = block.factorize(block.init(LAYER, jnp.float64), jnp.asarray(LAM))
    factors, _ = block.measure(a, g, use(), start)
    inverse = block.factorize(factors, jnp.asarray(LAM))
    _, moments = block.measure(a, g, use(), inverse)
    return factors, inverse._replace(moments=moments)


def dense_of(inverse):
    basis = np.kron(inverse.inputs.vectors, inverse.outputs.vectors)
    return (basis * np.ravel(inverse.moments)) @ basis.T


def exact_of_rows():
    a, g = oracles.normal(0, (N, P)), oracles.normal(1, (N, Q))
    rows = np.einsum("np,nq->npq", a, g).reshape(N, -1)
    return rows.T @ rows / N


def test_corrected_eigenvalues_are_those_of_ekfac(x64):
    """With the factors of TKFAC in place of K-FAC's, EKFAC solves the same; moments start as the
    product of the eigenvalues."""
    factors, inverse = corrected(tekfac_block())
    other = ko.ekfac_block()
    basis = other.factorize(Factors(*factors), jnp.asarray(LAM))
    a, g = oracles.normal(0, (N, P)), oracles.normal(1, (N, Q))
    _, moments = other.measure(a, g, use(), basis)
    v = oracles.normal(2, (P, Q))
    want = other.solve(basis._replace(moments=moments), v, jnp.asarray(LAM))
    got = tekfac_block().solve(inverse, v, jnp.asarray(LAM))
    np.testing.assert_allclose(got, want, rtol=1e-9)
    start = tekfac_block().factorize(factors, jnp.asarray(LAM)).moments
    delta = np.trace(factors.inputs)
    np.testing.assert_allclose(start, basis.moments / delta, rtol=1e-9, atol=1e-12)


def test_correction_is_nearer_and_keeps_the_trace(x64):
    factors, inverse = corrected(tekfac_block())
    exact, ours = exact_of_rows(), dense_of(inverse)
    plain = np.kron(*factors) / np.trace(factors.inputs)
    error, of_plain = (np.linalg.norm(exact - m) for m in (ours, plain))
    assert error < 0.97 * of_plain
    for matrix in (ours, plain):
        np.testing.assert_allclose(np.trace(matrix), np.trace(exact), rtol=1e-10)


@pytest.mark.parametrize("preset", [ko.tkfac, ko.tekfac, ko.kpsvd])
def test_layers_without_rows_of_examples_get_the_block_of_kfac(preset):
    params, x = {"w": oracles.normal(1, (2, 3))}, oracles.normal(0, (4, 3, 2))

    def predict(params, x):
        return ko.Categorical(h.dense(x.reshape(12, 2), params["w"]).reshape(4, 3, 3).sum(1))

    estimator = ko.ggn(predict)
    tx = preset(estimator.layers(params, x), kl_clip=None)
    kfac = ko.kfac(estimator.layers(params, x), kl_clip=None)

    @jax.jit
    def updates(x):
        curvature = estimator.at(params, x)
        return [
            t.update(params, t.init(params), params, curvature=curvature)[0] for t in (tx, kfac)
        ]

    ours, theirs = updates(x)
    h.assert_equal(ours, theirs)


def test_errors():
    with pytest.raises(ValueError, match="'expand', 'exact'"):
        tkfac_block(sharing="reduce")
    with pytest.raises(
        ValueError, match="split='trace', which has no effect beside inverse='eigh'"
    ):
        tkfac_block(split="trace")
    with pytest.raises(ValueError, match="positions=3, which has no effect beside sharing='exact'"):
        tkfac_block(sharing="exact", positions=3)
    with pytest.raises(ValueError, match="positions=0"):
        tkfac_block(positions=0)
    with pytest.raises(ValueError, match="tkfac_block: needs output gradients"):
        tkfac_block().measure(jnp.ones((N, P)), None, use())
