"""The sum of two Kronecker products, one per equation, against dense references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfac_optax as ko
from kfac_optax.blocks.kronecker.per_equation import EquationFactors, per_equation
from kfac_optax.experiments import jets
from kfac_optax.testing import Case
from kfac_optax.testing.case import dense_layer, matrix
from tests import oracles

P, Q = 3, 2
EDGE, INSIDE = 4, 6  # examples of the two equations


def told(block):
    """The block, told the head by the number of positions."""
    heads = {2: 0, 3: 1}

    def measure(a, g, use):
        return block.measure(a, g, use._replace(head=heads[a.shape[1]]))

    return block._replace(measure=measure)


def rows_of_two(seed, n):
    shapes = [(n, 2, P), (n, 2, Q)], [(n, 3, P), (n, 3, Q)]
    return [
        (oracles.normal(seed + 2 * i, a), oracles.normal(seed + 2 * i + 1, g))
        for i, (a, g) in enumerate(shapes)
    ]


def test_it_keeps_the_laws_of_a_block():
    ko.testing.check_block(Case(told(per_equation()), dense_layer(P, Q), rows_of_two))


def random_factors(seed=0):
    def psd(seed, n):
        roots = oracles.normal(seed, (2, n, n))
        return roots @ roots.transpose(0, 2, 1)

    return EquationFactors(psd(seed, P), psd(seed + 1, Q), jnp.asarray([0.25, 0.75]))


@pytest.mark.parametrize("missing", [None, 0, 1])
def test_solves_are_the_inverse_of_the_damped_sum(missing, x64):
    """Each term with half of the damping, shared out by the traces; a missing term is its damping."""
    factors, block, damping = random_factors(), per_equation(), 0.3
    if missing is not None:
        keep = jnp.arange(2) != missing
        factors = jax.tree.map(lambda x: jnp.einsum("k...,k->k...", x, keep), factors)
    total = np.zeros((P * Q, P * Q))
    for k in range(2):
        a, g = (np.asarray(x[k]) for x in (factors.inputs, factors.outputs))
        share, half = float(factors.share[k]), np.sqrt(damping / 2)
        g = g / share if share else g
        pi = np.sqrt((np.trace(a) / P) / (np.trace(g) / Q)) if share else 1
        total += np.kron(a + pi * half * np.eye(P), g + half / pi * np.eye(Q))
    inverse = jax.jit(block.factorize)(factors, jnp.asarray(damping))
    solved = matrix(block.solve, (P, Q), inverse, jnp.asarray(damping))
    np.testing.assert_allclose(solved, np.linalg.inv(total), rtol=1e-9, atol=1e-11)


def blocks_of_a_net(predict, params, batch, block):
    """Matrices of every layer: of the block, and of the exact curvature of the loss."""
    estimator = ko.ggn(predict)
    plan = oracles.plan(estimator.layers(params, *batch), block=block)
    factors, _ = jax.jit(lambda: estimator.at(params, *batch).statistics(plan))()
    flat, unravel = ravel_pytree(params)

    def roots(flat):
        """Whose Jacobian's Gram is the curvature."""
        heads = jax.tree.leaves(predict(unravel(flat), *batch), is_leaf=lambda x: hasattr(x, "nll"))
        return [jnp.ravel(h.mean) / h.scale / np.sqrt(len(h.mean)) for h in heads]

    jacobian = np.concatenate(jax.jit(jax.jacrev(roots))(flat))
    start, pairs = 0, []
    for statistic, weight in zip(factors, params.values(), strict=True):
        one = jax.tree.map(lambda x: x[0], statistic)
        mine = jacobian[:, start : start + weight.size]
        pairs.append((matrix(block.multiply, weight.shape, one), mine.T @ mine))
        start += weight.size
    return pairs


def cosine(x, y):
    return np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y)


def linear_net(params, x, rows):
    """A deep linear network on values `[N, d]` or on rows `[N, R, d]`."""
    x = jnp.stack([x, 0.5 * x**2, jnp.cos(x)], 1) if rows else x[:, None]
    for weight in params.values():
        x = ko.tap_dense(x @ weight, x, weight)
    return x


def two_residuals(pooled):
    def predict(params, edge, inside):
        rows = linear_net(params, inside, rows=True)
        rows = rows.sum(1) if pooled else rows
        return ko.Normal(linear_net(params, edge, rows=False)[:, 0]), ko.Normal(rows, scale=0.2)

    return predict


def linear_params():
    return {"first": oracles.normal(0, (2, 3)), "second": oracles.normal(1, (3, 2))}


@pytest.mark.parametrize(("sharing", "pooled"), [("expand", False), ("reduce", True)])
def test_it_is_the_curvature_of_the_residuals_where_the_net_is_linear(sharing, pooled, x64):
    """With batches of different sizes; what adds all uses up is not."""
    batch = oracles.normal(7, (EDGE, 2)), oracles.normal(8, (INSIDE, 2))
    args = two_residuals(pooled), linear_params(), batch
    for got, exact in blocks_of_a_net(*args, per_equation(sharing=sharing)):
        np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-10 * np.abs(exact).max())
    summed = blocks_of_a_net(*args, ko.kronecker(sharing=sharing))
    assert max(np.abs(got / exact.max() - exact / exact.max()).max() for got, exact in summed) > 0.1


def test_it_is_close_to_the_curvature_of_a_laplacian(x64):
    """Of a tanh network, where the rows of a point are taken for independent."""
    params = jets.init(jax.random.key(0), (2, 5, 5, 1), jnp.float64)
    uniform = lambda seed, n: jnp.asarray(np.random.default_rng(seed).uniform(size=(n, 2)))

    def predict(params, edge, inside):
        residual = jets.network_jet(params, inside).laplacian[:, 0]
        return ko.Normal(jets.network(params, edge)), ko.Normal(residual)

    batch = uniform(1, 8), uniform(2, 30)
    cosines = [cosine(*pair) for pair in blocks_of_a_net(predict, params, batch, per_equation())]
    assert min(cosines) > 0.6


def test_a_use_has_to_serve_one_of_two_heads():
    w, x = jnp.ones((2, 1)), jnp.ones((3, 2))

    def measure(predict):
        estimator = ko.ggn(predict)
        plan = oracles.plan(estimator.layers(w, x), block=per_equation(), dtype=jnp.float32)
        jax.eval_shape(lambda: estimator.at(w, x).statistics(plan))

    def shared(w, x):
        u = ko.tap_dense(x @ w, x, w)
        return ko.Normal(u), ko.Normal(2 * u)

    def three(w, x):
        return [ko.Normal(ko.tap_dense(x @ w, x, w)) for _ in range(3)]

    with pytest.raises(
        ValueError, match=r"layer \(root\) serves several heads; expected one of two"
    ):
        measure(shared)
    with pytest.raises(ValueError, match=r"serves head 2 \(counted from 0\)"):
        measure(three)
    with pytest.raises(ValueError, match="positions=0"):
        per_equation(positions=0)
    with pytest.raises(ValueError, match="expected one of 'expand', 'reduce'"):
        per_equation(sharing="mean")
