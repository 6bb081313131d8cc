"""HyLo in the space of examples against dense inverses of the Fisher matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Average, Use
from kfac_optax.blocks.batch_rows import Columns
from kfac_optax.linalg.interpolative import interpolate, middle_of_interpolation
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")
N, P, Q, LAM = 6, 4, 3, 0.3


def make_use(examples=N, weights=None, bias=False):
    return Use(ko.testing.dense_layer(P, Q, bias=bias), examples, examples, jnp.float64, weights)


def inverse_of(block, a, g, use=None, damping=LAM, count=1):
    statistic, new = block.measure(a, g, make_use(len(a)) if use is None else use)
    return absorbed(block, statistic, jax.tree.map(lambda x: x[None], new), damping, count)


def absorbed(block, statistic, new, damping=LAM, count=1):
    return compiled(block)(statistic, new, jnp.asarray(damping), jnp.int32(count))


@functools.cache
def compiled(block):
    @jax.jit
    def absorb(statistic, new, damping, count):
        start = block.factorize(statistic, damping)
        average = Average(jnp.float32(0.5), count, jnp.float32(0.5))
        return block.absorb(start, new, statistic, damping, average)

    return absorb


def dense(block, inverse):
    return oracles.matrix_of(jax.jit(lambda v: block.solve(inverse, v, None)), P, Q)


def fisher(a, g, weights=1.0):
    rows = np.einsum("bp,bq->bpq", a, g).reshape(len(a), -1)
    return (rows.T * weights) @ rows / len(a)


def damped_inverse(matrix, damping=LAM):
    return np.linalg.inv(matrix + damping * np.eye(len(matrix)))


@functools.cache
def batch(seed=0, examples=N):
    return oracles.normal(seed, (examples, P)), oracles.normal(seed + 1, (examples, Q))


@pytest.mark.parametrize("selection", ["kid", "kis"])
@pytest.mark.parametrize("rank", [N, N + 3])
def test_enough_rows_are_the_exact_inverse(rank, selection):
    block = ko.hylo_block((P, Q), rank, selection=selection)
    got = dense(block, inverse_of(block, *batch()))
    np.testing.assert_allclose(got, damped_inverse(fisher(*batch())), rtol=1e-10, atol=1e-12)


def test_with_enough_rows_it_is_the_exact_natural_gradient_of_each_layer():
    """Of a net, with `ggn`: two columns of ten rows in all, and a bias."""
    params, x = oracles.make_params(0, (3, 4, 2)), oracles.normal(1, (5, 3))
    estimator = ko.ggn(oracles.regressor)
    tx = ko.hylo(estimator.layers(params, x), rank=10, damping=LAM)
    update, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p, curvature=estimator.at(p, x)))(params)
    columns = jnp.broadcast_to(jnp.eye(2)[:, None], (2, 5, 2))
    a, g = oracles.per_example(params, x, columns)
    exact = oracles.block_diagonal(oracles.exact_fisher(a, g), oracles.block_sizes(a, g))
    want = damped_inverse(exact) @ oracles.flatten(params)
    np.testing.assert_allclose(oracles.flatten(update), want, rtol=1e-9, atol=1e-11)


def test_decomposition_of_all_rows_is_exact():
    """Also of a matrix whose rank is that: eight rows of which four are copies."""
    a, g = (jnp.concatenate([x[:4], 2 * x[:4]]) for x in batch())
    block = ko.hylo_block((P, Q), 4, selection="kid")
    inverse = inverse_of(block, a, g)
    want = damped_inverse(fisher(a, g))
    np.testing.assert_allclose(dense(block, inverse), want, rtol=1e-9, atol=1e-11)
    # more rows than the rank: pivots of rounding are left out
    block = ko.hylo_block((P, Q), 7, selection="kid")
    np.testing.assert_allclose(dense(block, inverse_of(block, a, g)), want, rtol=1e-8, atol=1e-10)


def test_the_error_of_a_decomposition_falls_with_its_rank():
    a, g = batch(5, 12)
    want, errors = damped_inverse(fisher(a, g)), []
    for rank in (2, 6, 10):
        block = ko.hylo_block((P, Q), rank, selection="kid")
        got = dense(block, inverse_of(block, a, g))
        assert np.linalg.eigvalsh((got + got.T) / 2).min() > 0
        errors.append(np.linalg.norm(got - want))
    assert errors[0] > errors[1] > errors[2]


def test_an_interpolation_is_the_formula_of_the_paper():
    """With `P`, `E`, `M` and an inverse of `K_S` written out."""
    random = np.random.default_rng(0).normal(size=(6, 5))
    k, shift = random @ random.T + 0.1 * np.eye(6), 0.2
    found = interpolate(jnp.asarray(k), 3)
    s = np.asarray(found.rows)
    p = k[:, s] @ np.linalg.inv(k[np.ix_(s, s)])
    np.testing.assert_allclose(p[s], np.eye(3), atol=1e-12)
    e = k - p @ k[np.ix_(s, s)] @ p.T
    assert np.linalg.eigvalsh(e).min() > -1e-12
    m = p.T @ np.linalg.inv(shift * np.eye(6) + e) @ p
    want = m - m @ np.linalg.inv(np.linalg.inv(k[np.ix_(s, s)]) + m) @ m
    got = middle_of_interpolation(jnp.asarray(k), found, jnp.asarray(shift))
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_an_example_twice_is_one_of_weight_two():
    a, g = batch()
    twice = [jnp.concatenate([x, x[:1]]) for x in (a, g)]
    weights = jnp.asarray([2.0] + [1.0] * (N - 1)) * N / (N + 1)
    block = ko.hylo_block((P, Q), N + 1)
    weighted = inverse_of(block, a, g * jnp.sqrt(weights)[:, None], make_use(N, weights))
    got, want = dense(block, weighted), dense(block, inverse_of(block, *twice))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_positions_are_pooled_and_padding_is_not_read():
    a, g = oracles.normal(0, (N, 3, P)), oracles.normal(1, (N, 3, Q))
    weights = np.ones((N, 3))
    weights[0], weights[1, 2] = 0, 0
    weights = jnp.asarray(weights / weights.mean())
    inside = g * jnp.sqrt(weights)[..., None]
    read = jnp.where(weights[..., None] == 0, jnp.nan, a)
    block = ko.hylo_block((P, Q), N)
    inverse = inverse_of(block, read, inside, make_use(N, weights)._replace(rows=3 * N))
    mean = np.stack([np.zeros(P), a[1, :2].mean(0), *a[2:].mean(1)])
    want = damped_inverse(fisher(mean, inside.sum(1)))
    np.testing.assert_allclose(dense(block, inverse), want, rtol=1e-10, atol=1e-12)


def test_rows_of_all_pullbacks_and_devices_are_a_mean():
    """Two pullbacks that share their inputs; two halves joined as devices join them."""
    a, g = batch()
    other = oracles.normal(7, (N, Q))
    block = ko.hylo_block((P, Q), 2 * N)
    statistic, first = block.measure(a, g, make_use())
    _, second = block.measure(a, other, make_use())
    inputs = jnp.stack([first.inputs, second.inputs])
    both = Columns(inputs, jnp.stack([first.outputs, second.outputs]))
    want = damped_inverse((fisher(a, g) + fisher(a, other)) / 2)
    got = dense(block, absorbed(block, statistic, both))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)

    halves = [block.measure(x, y, make_use(N // 2))[1] for x, y in ((a[:3], g[:3]), (a[3:], g[3:]))]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x)[None] / np.sqrt(2), *halves)
    got = dense(block, absorbed(block, statistic, joined))
    np.testing.assert_allclose(got, damped_inverse(fisher(a, g)), rtol=1e-10, atol=1e-12)


def test_sampled_rows_have_the_fisher_matrix_for_mean():
    """Within four standard errors of it, entry by entry; and they are drawn anew every time."""
    a, g = batch()
    block = of_kind("kis")
    statistic, new = block.measure(a, g, make_use())
    new = jax.tree.map(lambda x: x[None], new)

    @jax.jit
    @jax.vmap
    def sample(count):
        average = Average(jnp.float32(0.5), count, jnp.float32(0.5))
        start = block.factorize(statistic, jnp.asarray(LAM))
        inverse = block.absorb(start, new, statistic, jnp.asarray(LAM), average)
        rows = jnp.einsum("bp,bq->bpq", inverse.inputs, inverse.outputs).reshape(3, -1)
        return rows.T @ rows, inverse.middle

    count = 4000
    drawn, middle = sample(jnp.arange(1, count + 1, dtype=jnp.int32))
    error = np.std(drawn, 0) / np.sqrt(count)
    assert (np.abs(drawn.mean(0) - fisher(a, g)) <= 4.5 * error + 1e-12).all()
    assert len(np.unique(np.asarray(middle[:, 0, 0]).round(9))) > 3


def test_the_middle_of_sampled_rows_inverts_them():
    a, g = batch()
    block = of_kind("kis")
    inverse = inverse_of(block, a, g)
    drawn = fisher(inverse.inputs, inverse.outputs) * 3
    np.testing.assert_allclose(dense(block, inverse), damped_inverse(drawn), rtol=1e-10, atol=1e-12)


@functools.cache
def of_kind(selection):
    return ko.hylo_block((P, Q), 3, selection=selection)


@pytest.mark.parametrize("critical", [2, lambda count: count == 3])
def test_the_switch_decomposes_where_it_is_critical(critical):
    a, g = batch()
    block = ko.hylo_block((P, Q), 3, critical=critical)
    kinds = {name: of_kind(name) for name in ("kid", "kis")}
    for count in (1, 2, 3, 4):
        now = critical(count) if callable(critical) else count <= critical
        want = inverse_of(kinds["kid" if now else "kis"], a, g, count=count)
        got = inverse_of(block, a, g, count=count)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), got, want)


def test_the_switch_is_a_branch_for_all_layers_together():
    a, g = (x[None, None] for x in batch())
    block = ko.hylo_block((P, Q), 3)

    def absorb(count):
        new, statistic = Columns(a, g), jnp.ones(1)
        start = jax.vmap(block.factorize, (0, None))(statistic, jnp.asarray(LAM))
        average = Average(jnp.float32(0.5), count, jnp.float32(0.5))
        both = jax.vmap(block.absorb, (0, 0, 0, None, None))
        return both(start, new, statistic, jnp.asarray(LAM), average)

    # those that sums choose by platform stay; with a count of their own layers would compute both
    together = str(jax.make_jaxpr(absorb)(jnp.int32(1))).count("cond[")
    apart = str(jax.make_jaxpr(jax.vmap(absorb))(jnp.ones(2, jnp.int32))).count("cond[")
    assert together == apart + 1


def test_layers_without_examples_get_the_block_of_kfac():
    def predict(params, x):
        flat = ko.tap_dense(x.reshape(-1, P) @ params["flat"], x.reshape(-1, P), params["flat"])
        s = flat.reshape(len(x), -1, Q).sum(1)
        return ko.Normal(ko.tap_dense(s @ params["head"], s, params["head"]))

    params = {"flat": jnp.zeros((P, Q)), "head": jnp.zeros((Q, 2))}
    layers = ko.ggn(predict).layers(params, jnp.ones((N, 5, P)))
    state = jax.eval_shape(ko.hylo(layers, rank=3).init, params).preconditioner
    kinds = {name: type(x).__name__ for name, x in state.inverses.items()}
    assert kinds == {"dense_4x3": "EigenInverse", "dense_3x2": "ExampleInverse"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ko.hylo_block((P, Q), 0), "rank=0; expected rank >= 1"),
        (
            lambda: ko.hylo_block((P, Q), selection="best"),
            "selection='best'; expected one of 'kid'",
        ),
        (lambda: ko.hylo_block((P, Q), critical=-1), "critical=-1; expected critical >= 0"),
        (lambda: ko.hylo_block((P, Q)).multiply(None, None), "no average is kept"),
        (
            lambda: ko.hylo_block((P, Q)).measure(batch()[0], None, make_use()),
            "hylo_block: needs output gradients.*measures inputs only",
        ),
    ],
)
def test_wrong_settings_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
