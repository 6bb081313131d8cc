"""SKFAC in the space of rows against dense K-FAC of the same batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Average, Use
from tests import helpers, oracles

pytestmark = pytest.mark.usefixtures("x64")
P, Q, LAM = 7, 5, 0.3
NEVER = Average(jnp.float32(0.5), jnp.int32(1), jnp.float32(0.5))


def make_use(examples, rows, weights=None, bias=False):
    return Use(ko.testing.dense_layer(P, Q, bias=bias), examples, rows, jnp.float64, weights)


def solved(block, statistic, new, v, damping=LAM):
    """What `block` makes of `V` once a batch has come in."""

    @jax.jit
    def solve(statistic, new, v, damping):
        start = block.factorize(statistic, damping)
        inverse = block.absorb(start, new, statistic, damping, NEVER)
        return block.solve(inverse, v, damping)

    return solve(statistic, new, v, jnp.asarray(damping))


def with_pullbacks(new):
    return jax.tree.map(lambda x: x[None], new)


def damped(factors):
    """`(A + pi sqrt(damping) I) (x) (G + sqrt(damping) / pi I)`, formed."""
    mean_a, mean_g = (np.trace(x) / len(x) for x in factors)
    pi, root = np.sqrt(mean_a / mean_g), np.sqrt(LAM)
    shifts = pi * root, root / pi
    return np.kron(*(x + s * np.eye(len(x)) for x, s in zip(factors, shifts, strict=True)))


@pytest.mark.parametrize(
    ("examples", "bias"), [(2, True), (3, False), (6, True)], ids=["few", "between", "many"]
)
def test_it_is_factored_tikhonov_of_the_batch(examples, bias):
    """Fewer rows than outputs, than inputs alone, more than both; weights, padding of NaN."""
    a, g = oracles.normal(0, (examples, 2, P)), oracles.normal(1, (examples, 2, Q))
    weights = np.random.default_rng(2).uniform(0.5, 2, (examples, 2))
    weights[0] = 0
    g = jnp.where(weights[..., None] == 0, 0, g)
    use = make_use(examples, 2 * examples, jnp.asarray(weights), bias)
    block = ko.skfac_block((P + bias, Q), 2 * examples)
    statistic, new = block.measure(a.at[0].set(jnp.nan), g, use)
    factors = ko.kronecker().measure(a, g, use)
    for mean, factor in zip(statistic, factors, strict=True):
        np.testing.assert_allclose(mean, np.trace(factor) / len(factor), rtol=1e-12)
    v = oracles.normal(3, (P + bias, Q))
    want = np.ravel(v) @ np.linalg.inv(damped(factors))
    got = np.ravel(solved(block, statistic, with_pullbacks(new), v))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_pooled_positions_are_those_of_kfac_reduce():
    a, g = oracles.normal(0, (4, 3, P)), oracles.normal(1, (4, 3, Q))
    block = ko.skfac_block((P, Q), 4, sharing="reduce")
    statistic, new = block.measure(a, g, make_use(4, 12))
    factors = ko.kronecker().measure(a.mean(1), g.sum(1), make_use(4, 4))
    v = oracles.normal(3, (P, Q))
    got = np.ravel(solved(block, statistic, with_pullbacks(new), v))
    want = np.ravel(v) @ np.linalg.inv(damped(factors))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_a_large_damping_leaves_the_gradient():
    a, g, v = (oracles.normal(i, size) for i, size in enumerate(((4, P), (4, Q), (P, Q))))
    block = ko.skfac_block((P, Q), 4)
    statistic, new = block.measure(a, g, make_use(4, 4))
    got = 1e14 * solved(block, statistic, with_pullbacks(new), v, 1e14)
    np.testing.assert_allclose(got, v, rtol=1e-5, atol=1e-6)


def problem(inputs=23, outputs=17, examples=4):
    def predict(w, x):
        return ko.Normal(ko.tap_dense(x @ w, x, w))

    w, x = oracles.normal(0, (inputs, outputs)), oracles.normal(1, (examples, inputs))
    y = oracles.normal(2, (examples, outputs))
    return ko.empirical_fisher(lambda w, x, y: predict(w, x).nll(y)), ko.ggn(predict), w, x, y


def test_a_step_is_kfac_without_memory_and_with_any_estimator():
    """Two batches; the second has fewer examples than there is room for."""
    empirical, ggn, w, x, y = problem(6, 3)
    for estimator, arguments, rows, counts in (
        (empirical, (x, y), 4, (4, 3)),
        (ggn, (x,), 12, (4,)),
    ):
        layers = estimator.layers(w, *arguments)
        options = dict(damping=LAM, curvature_every=1)
        tx = ko.skfac(layers, rows=rows, **options)
        plain = ko.kfac(
            layers, inverse="cholesky", kl_clip=None, decay=0.0, inverse_every=1, **options
        )

        @jax.jit
        def both(states, *batch, txs=(tx, plain), estimator=estimator):
            curvature = estimator.at(w, *batch)
            pairs = zip(txs, states, strict=True)
            return [each.update(w, state, w, curvature=curvature) for each, state in pairs]

        states = [tx.init(w), plain.init(w)]
        for count in counts:
            (got, one), (want, two) = both(states, *(z[:count] for z in arguments))
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-11)
            states = [one, two]


def sizes(program):
    for equation in helpers.equations(program):
        yield from (x.aval.shape for x in equation.outvars if hasattr(x.aval, "shape"))


@pytest.mark.parametrize("make", [ko.skfac, ko.hylo, ko.eva, ko.eva_f])
def test_no_matrix_of_a_layers_width_is_formed(make):
    """Neither `p x p` nor `q x q`, nor rows of all entries; in the start and in a step."""
    empirical, _, w, x, y = problem()
    words = {ko.hylo: {"rank": 2}, ko.skfac: {}}.get(make, {"kl_clip": None})
    tx = make(empirical.layers(w, x, y), **words)

    def step(w, state):
        return tx.update(w, state, w, curvature=empirical.at(w, x, y))

    state = jax.eval_shape(tx.init, w)
    shapes = {
        *sizes(jax.make_jaxpr(tx.init)(w).jaxpr),
        *sizes(jax.make_jaxpr(step)(w, state).jaxpr),
    }
    p, q = w.shape
    assert any(shape[-2:] == (p, q) for shape in shapes)
    largest = max(int(np.prod(shape)) for shape in shapes)
    assert largest == p * q < p * p
    assert not [
        s for s in shapes if s[-2:] in ((q, q), (p, p)) or (len(s) and s[-1] == p * q > p + q)
    ]


def test_layers_without_such_rows_get_the_block_of_kfac():
    params = {"table": jnp.zeros((6, 9)), "w": jnp.zeros((9, 2)), "conv": jnp.zeros((3, 2, 2))}

    def predict(params, tokens):
        x = ko.tap_embedding(params["table"][tokens], tokens, params["table"])
        x = ko.tap_dense(x @ params["w"], x, params["w"])
        s = jax.lax.conv_general_dilated(
            x, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        s = ko.tap_conv(s, x, params["conv"], padding="SAME")
        return ko.Normal(s.sum(1))

    layers = ko.ggn(predict).layers(params, jnp.zeros((2, 3), int))
    state = jax.eval_shape(ko.skfac(layers).init, params).preconditioner
    kinds = {name: type(x).__name__ for name, x in state.inverses.items()}
    assert kinds == {
        "embedding_6x9": "TokenEigenInverse",
        "dense_9x2": "SampleInverse",
        "conv_6x2": "DenseInverse",
    }
    pooled = jax.eval_shape(ko.skfac(layers, sharing="reduce", rows=2).init, params)
    rows = [
        x.inputs.rows.shape
        for x in pooled.preconditioner.inverses.values()
        if type(x).__name__ == "SampleInverse"
    ]
    assert sorted(rows) == [(1, 2, 6), (1, 2, 9)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ko.skfac_block((2, 2), 0), "rows=0; expected rows >= 1"),
        (lambda: ko.skfac_block((2, 2), 1, sharing="pool"), "sharing='pool'"),
        (lambda: ko.skfac_block((2, 2), 1).multiply(None, None), "no average of the factors"),
        (lambda: too_many(), r"a batch has 68 rows .* made for 4.* pass rows=68"),
        (lambda: inputs_alone(), "skfac_block: needs output gradients.*measures inputs only"),
    ],
)
def test_wrong_settings_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def too_many():
    _, ggn, w, x, _ = problem()
    tx = ko.skfac(ggn.layers(w, x))
    jax.eval_shape(lambda w: tx.update(w, tx.init(w), w, curvature=ggn.at(w, x)), w)


def inputs_alone():
    ko.skfac_block((P, Q), 2).measure(jnp.ones((2, P)), None, make_use(2, 2))
