"""FOOF's blocks against dense references, K-FAC with `G = I`, and what the method promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._types import Use
from kfac_optax.blocks.kronecker.foof import foof_block
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.testing import dense_layer
from tests import helpers, oracles

pytestmark = pytest.mark.usefixtures("x64")
N, R, P, Q = 6, 3, 4, 2
LAM = jnp.asarray(0.3)
dense = functools.partial(oracles.matrix_of, q=Q)


def make_use(rows=N, weights=None, bias=False, inputs=P):
    return Use(dense_layer(inputs, Q, bias=bias), N, rows, jnp.float64, weights)


def solve(block, statistic, v, damping=LAM):
    return block.solve(block.factorize(statistic, damping), v, damping)


def positions_weights():
    w = np.random.default_rng(7).uniform(0.5, 2, (N, R))
    w[0], w[1, 2] = 0, 0
    return jnp.asarray(w / w.mean())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_kfac_with_the_identity_for_outputs(bias, weighted):
    """And no damping of them: rows of positions, some masked with NaN in them, bias included."""
    a, g = oracles.normal(0, (N, R, P)), oracles.normal(1, (N, R, Q))
    w = positions_weights() if weighted else None
    read = a if w is None else jnp.where(w[..., None] == 0, jnp.nan, a)
    use = make_use(N * R, w, bias)
    block, full = foof_block(), kronecker("eigh")
    moment = block.measure(read, g, use)
    reference = full.measure(a, None, use)
    np.testing.assert_allclose(reference.outputs, np.eye(Q))
    np.testing.assert_allclose(moment, reference.inputs, rtol=1e-12)
    v = oracles.normal(2, (P + bias, Q))
    np.testing.assert_allclose(solve(block, moment, v), solve(full, reference, v), rtol=1e-10)
    np.testing.assert_allclose(block.multiply(moment, v), full.multiply(reference, v), rtol=1e-12)
    want = np.linalg.solve(np.asarray(moment) + float(LAM) * np.eye(P + bias), v)
    np.testing.assert_allclose(solve(block, moment, v), want, rtol=1e-10)


@pytest.mark.parametrize("make", [ko.forward_only, ko.ggn], ids=["forward_only", "ggn"])
def test_it_is_the_exact_curvature_of_a_gaussian_layer(make):
    """Shared over positions with unit variance each; the estimator's own cotangents play no part."""
    x, w = oracles.normal(0, (N, R, P)), oracles.normal(1, (P, Q))
    estimator = make(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    plan = oracles.plan(estimator.layers(w, x), block=foof_block())
    (moment,), _ = jax.jit(lambda: estimator.at(w, x).statistics(plan))()

    def loss(flat):
        return jnp.sum(jnp.square(x @ flat.reshape(P, Q))) / 2 / N

    exact = jax.hessian(loss)(jnp.ravel(w))
    got = dense(lambda v: foof_block().multiply(moment[0], v), P)
    np.testing.assert_allclose(got, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mask", [False, True])
def test_a_convolution_has_its_patches_for_inputs(mask):
    x, kernel, bias = oracles.normal(0, (N, 5, 2)), oracles.normal(1, (3, 2, Q)), jnp.zeros(Q)
    w = jnp.ones(N).at[1].set(0) if mask else None
    x = x if w is None else x.at[1].set(jnp.nan)

    def conv(params, x):
        s = jax.lax.conv_general_dilated(
            x, params[0], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return ko.tap_conv(s + params[1], x, *params, padding="VALID")

    estimator = ko.forward_only(lambda p, x: ko.Normal(conv(p, x).sum(1), weights=w))
    params = kernel, bias
    plan = oracles.plan(estimator.layers(params, x), block=foof_block())
    (moment,), _ = jax.jit(lambda: estimator.at(params, x).statistics(plan))()
    kept = np.asarray(x) if w is None else np.asarray(x)[np.asarray(w) > 0]
    patches = np.stack([kept[:, i : i + 3].reshape(len(kept), 6) for i in range(3)], 1)
    rows = np.concatenate([patches, np.ones((*patches.shape[:2], 1))], -1)
    want = np.einsum("nri,nrj->ij", rows, rows) / len(kept)
    np.testing.assert_allclose(moment[0], want, rtol=1e-10)


def test_the_neurons_of_every_example_take_their_own_gradient_step():
    """With `N <= p` independent inputs and next to no damping, `U^T a_b = g_b`."""
    n = 3
    a, g = oracles.normal(0, (n, P)), oracles.normal(1, (n, Q))
    moment = foof_block().measure(a, g, make_use(n)._replace(examples=n))
    update = solve(foof_block(), moment, a.T @ g / n, jnp.asarray(1e-9))
    np.testing.assert_allclose(a @ update, g, rtol=1e-4, atol=1e-6)


def test_it_is_the_limit_of_factored_damping():
    """With `root / pi` far above `G`, K-FAC at `damping = root^2` is FOOF at `pi root`, rescaled."""
    a, g, v = oracles.normal(0, (N, P)), oracles.normal(1, (N, Q)), oracles.normal(2, (P, Q))
    factors = kronecker("cholesky").measure(a, g, make_use())
    pi = np.sqrt((np.trace(factors.inputs) / P) / (np.trace(factors.outputs) / Q))

    def compare(root):
        kfac = np.ravel(solve(kronecker("cholesky"), factors, v, jnp.asarray(root**2)))
        foof = np.ravel(solve(foof_block(), factors.inputs, v, jnp.asarray(pi * root)))
        error = np.linalg.norm(kfac * root / pi - foof) / np.linalg.norm(foof)
        return error, kfac @ foof / np.linalg.norm(kfac) / np.linalg.norm(foof)

    errors, cosines = zip(*[compare(root) for root in (1e-1, 1e1, 1e3)], strict=True)
    assert errors[0] > 0.3 and errors[2] < 0.02 * errors[1]  # in proportion to G over root / pi
    assert cosines[0] < 0.99 and cosines[2] > 1 - 1e-6


def one_hot(tokens):
    return jax.nn.one_hot(tokens, 5, dtype=jnp.float64)


def test_tokens_are_one_hot_inputs():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (N, R)))
    w, v = positions_weights(), oracles.normal(1, (5, Q))
    block, full = foof_block("embedding"), foof_block()
    counts = block.measure(tokens, None, make_use(N * R, w, inputs=5))
    moment = full.measure(one_hot(tokens), None, make_use(N * R, w, inputs=5))
    np.testing.assert_allclose(np.diag(counts), moment, atol=1e-14)
    np.testing.assert_allclose(solve(block, counts, v), solve(full, moment, v), rtol=1e-10)
    np.testing.assert_allclose(block.multiply(counts, v), full.multiply(moment, v), atol=1e-12)


def test_a_tied_table_is_the_sum_of_its_two_uses():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (N, R)))
    h, block = oracles.normal(2, (N, Q)), foof_block("tied_embedding")
    use = make_use(N * (R + 1), inputs=5)
    total = jax.tree.map(jnp.add, block.measure(tokens, None, use), block.measure(h, None, use))

    def loss(flat):
        table = flat.reshape(5, Q)
        return (jnp.sum(jnp.square(table[tokens])) + jnp.sum(jnp.square(h @ table.T))) / 2 / N

    exact = np.asarray(jax.hessian(loss)(jnp.zeros(5 * Q)))
    np.testing.assert_allclose(dense(lambda v: block.multiply(total, v), 5), exact, atol=1e-10)
    want = np.linalg.inv(exact + float(LAM) * np.eye(5 * Q))
    np.testing.assert_allclose(dense(lambda v: solve(block, total, v), 5), want, atol=1e-10)


def test_scale_and_shift_have_their_two_inputs():
    x, g = oracles.normal(0, (N, R, Q)), oracles.normal(1, (N, R, Q))
    block = foof_block("scale_shift")
    moment = block.measure(x, g, make_use(N * R, bias=True, inputs=1))
    rows = np.stack([x, np.ones_like(x)], -1)
    np.testing.assert_allclose(moment, np.einsum("nrci,nrcj->cij", rows, rows) / N, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 20])
def test_rows_are_solved_for_where_that_is_cheaper(rows):
    a, g = oracles.normal(0, (rows, P)), oracles.normal(1, (rows, Q))
    block = foof_block()
    inverse = block.factorize(block.measure(a, g, make_use(rows)), LAM)
    got = block.solve_rows(inverse, a, g, LAM)
    if rows > 1:
        assert got is None
    else:
        update, (b, h) = got
        np.testing.assert_allclose(update, block.solve(inverse, a.T @ g, LAM), rtol=1e-10)
        np.testing.assert_allclose(b.T @ h, update, rtol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match="expected one of 'linear', 'embedding'"):
        foof_block("conv")
    with pytest.raises(ValueError, match="expected integer tokens"):
        foof_block("embedding").measure(jnp.ones((2, 3)), None, make_use())
    with pytest.raises(ValueError, match=r"head inputs of size 3; expected 2 for a table 4x2"):
        foof_block("tied_embedding").measure(jnp.ones((2, 3)), None, make_use())
    with pytest.raises(ValueError, match="positions=0"):
        foof_block(positions=0)
    with pytest.raises(ValueError, match="expected one of 'pass', 'graft', 'raise'"):
        ko.foof(helpers.plain_problem().layers, uncovered="diagonal")


@pytest.mark.parametrize("make", [ko.forward_only, ko.ggn], ids=["forward_only", "ggn"])
def test_it_trains(make):
    problem = helpers.linen_problem()
    estimator = make(problem.predict)
    tx = optax.chain(
        ko.foof(problem.layers, curvature_every=2, inverse_every=3), optax.sgd(0.3, 0.9)
    )

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(problem.loss)(params)
            curvature = estimator.at(params, problem.x)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, tx.init(params)), length=25)[1]

    losses = train(problem.params)
    assert losses[-1] < 0.1 * losses[0]
