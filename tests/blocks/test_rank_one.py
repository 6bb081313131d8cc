"""Blocks of rank one against dense references, and their means against gradients of the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._types import Use
from kfac_optax.blocks.kronecker.foof import foof_block
from kfac_optax.blocks.rank_one.rank_one import Means, rank_one
from kfac_optax.engine.choice import blocks_of
from kfac_optax.estimators.plan import Plan
from kfac_optax.testing import dense_layer
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")
N, T, P, Q = 6, 3, 4, 2
LAM = jnp.asarray(0.3)
dense = functools.partial(oracles.matrix_of, q=Q)


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_solve_is_the_dense_inverse(outputs, weighted):
    """Rows of positions with a bias; those of weight zero hold NaN."""
    a, g, w = oracles.normal(0, (N, T, P)), oracles.normal(1, (N, T, Q)), jnp.ones((N, T))
    if weighted:
        w = jnp.asarray(np.random.default_rng(7).uniform(0.5, 2, (N, T))).at[0].set(0)
    read = jnp.where(w[..., None] == 0, jnp.nan, a)
    use = Use(dense_layer(P, Q, bias=True), N, N * T, jnp.float64, w if weighted else None)
    block = rank_one(outputs)
    means = block.measure(read, g * w[..., None], use)
    rows = np.concatenate([a, np.ones((N, T, 1))], -1)
    mean_a = np.einsum("nt,ntp->p", w, rows) / N / T
    mean_g = np.einsum("nt,ntq->q", w, g) / N / T
    c = np.ravel(np.outer(mean_a, mean_g))
    want = np.outer(c, c) if outputs else np.kron(np.outer(mean_a, mean_a), np.eye(Q))
    got = dense(lambda v: block.multiply(means, v), P + 1)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    inverse = block.factorize(means, LAM)
    got = dense(lambda v: block.solve(inverse, v, LAM), P + 1)
    damped = want + float(LAM) * np.eye(len(want))
    np.testing.assert_allclose(got, np.linalg.inv(damped), rtol=1e-10, atol=1e-12)


def test_of_one_example_it_is_the_exact_damped_natural_gradient():
    params = oracles.make_params(0, (3, 4, 2))
    x, y = oracles.normal(1, (1, 3)), oracles.normal(2, (1, 2))
    losses = lambda p, x, y: jnp.sum(jnp.square(oracles.forward(p, x)[0] - y), 1)
    estimator = ko.empirical_fisher(losses)
    tx = ko.eva(estimator.layers(params, x, y), damping=0.1, kl_clip=None)
    gradient = jax.grad(lambda p: losses(p, x, y).mean())(params)
    curvature = estimator.at(params, x, y)
    updates, _ = jax.jit(lambda v, c: tx.update(v, tx.init(params), params, curvature=c))(
        gradient, curvature
    )
    for name in params:
        v, got = (oracles.flatten({name: tree[name]}) for tree in (gradient, updates))
        want = np.linalg.solve(np.outer(v, v) + 0.1 * np.eye(len(v)), v)
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_of_equal_inputs_eva_f_is_foof():
    a, v = oracles.normal(0, (P,)), oracles.normal(1, (P, Q))
    use = Use(dense_layer(P, Q), N, N, jnp.float64)
    rows = jnp.broadcast_to(a, (N, P))
    solved = []
    for block in (rank_one(False), foof_block()):
        inverse = block.factorize(block.measure(rows, None, use), LAM)
        solved.append(block.solve(inverse, v, LAM))
    np.testing.assert_allclose(*solved, rtol=1e-10)


def layer(params, x):
    return ko.tap_dense(x @ params["w"] + params["b"], x, params["w"], params["b"])


def pointwise(params, x, weights):
    """Positions with a label each."""
    return ko.Normal(jnp.tanh(layer(params, x)), weights=weights, batch_ndim=2)


def scanned(params, x, weights):
    """The same, one position after another."""
    out = jax.lax.scan(lambda _, xt: (None, layer(params, xt)), None, jnp.moveaxis(x, 1, 0))[1]
    return ko.Normal(jnp.tanh(jnp.moveaxis(out, 0, 1)), weights=weights, batch_ndim=2)


def pooled(params, x, weights):
    """Positions that are averaged before the label."""
    return ko.Normal(jnp.tanh(layer(params, x)).mean(1), weights=weights)


def data(predict):
    params = {"w": oracles.normal(0, (P, Q)), "b": oracles.normal(1, (Q,))}
    label = (N, Q) if predict is pooled else (N, T, Q)
    return params, oracles.normal(2, (N, T, P)), oracles.normal(3, label)


def some_weights(shape):
    w = jnp.asarray(np.random.default_rng(7).uniform(0.5, 2, shape)).at[0].set(0)
    return w if len(shape) == 1 else w.at[1, 2].set(0)


CASES = [
    (pointwise, None),
    (pointwise, (N, T)),
    (scanned, None),
    (scanned, (N, T)),
    (pooled, None),
    (pooled, (N,)),
]


def shared(estimator, params, args, targets, block):
    """The gradient and the means from one pass."""
    loss_fn = lambda prediction, y: prediction.mean_nll(y)
    if targets is None:
        loss_fn = lambda losses, _: losses.mean()
    plan = oracles.plan(estimator.layers(params, *args), block=block)

    @jax.jit
    def run():
        step = estimator.value_and_grad(loss_fn)
        key = jax.random.key(0)
        _, gradient, curvature = step(params, *args, targets=targets, key=key)
        return gradient, curvature.statistics(plan)[0][0]

    return run()


@pytest.mark.parametrize("make", [ko.ggn, ko.fisher, ko.forward_only], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("predict", "weighted"), CASES)
def test_means_of_a_shared_pass_are_those_of_the_loss(make, predict, weighted):
    """The mean output gradient is the bias' gradient; masked inputs are not read."""
    params, x, y = data(predict)
    w = None if weighted is None else some_weights(weighted)
    estimator = make(lambda p, x: predict(p, x, w))
    gradient, means = shared(estimator, params, (x,), y, rank_one())
    np.testing.assert_allclose(means.outputs[0], gradient["b"] / T, rtol=1e-10)
    rows = np.concatenate([x, np.ones((N, T, 1))], -1)
    spread = np.ones((N, T)) if w is None else np.asarray(w / w.mean()).reshape(N, -1)
    want = np.einsum("nt,ntp->p", np.broadcast_to(spread, (N, T)), rows) / N / T
    np.testing.assert_allclose(means.inputs[0], want, rtol=1e-10)


def test_padding_of_weight_zero_is_not_read():
    params, x, y = data(pooled)
    w = jnp.ones(N).at[0].set(0)
    estimator = ko.ggn(lambda p, x: pooled(p, x, w))
    _, got = shared(estimator, params, (x.at[0].set(jnp.nan),), y, rank_one())
    _, want = shared(estimator, params, (x,), y, rank_one())
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


def test_output_gradients_added_up_make_the_gradient_of_equal_inputs():
    params, x, y = data(pointwise)
    x = jnp.broadcast_to(x[:1, :1], x.shape)
    estimator = ko.ggn(lambda p, x: pointwise(p, x, None))
    gradient, (a, b) = shared(estimator, params, (x,), y, rank_one(sharing="reduce"))
    np.testing.assert_allclose(np.outer(a, b)[:-1], gradient["w"], rtol=1e-10)


def test_the_empirical_fisher_has_no_signs_for_means():
    """From its own pass and from the gradient's, which are the same numbers."""
    params, x, y = data(pooled)
    estimator = ko.empirical_fisher(lambda p, x, y: pooled(p, x, None).nll(y))
    plan = oracles.plan(estimator.layers(params, x, y), block=rank_one())
    (own,), _ = jax.jit(lambda: estimator.at(params, x, y).statistics(plan))()
    gradient, means = shared(estimator, params, (x, y), None, rank_one())
    want = jax.grad(lambda p: pooled(p, x, None).mean_nll(y))(params)
    np.testing.assert_allclose(gradient["w"], want["w"], rtol=1e-12)
    for got in (own, means):
        np.testing.assert_allclose(got.outputs[0], want["b"] / T, rtol=1e-10)


def test_second_moments_of_a_shared_empirical_pass_are_those_of_its_own():
    params, x, y = data(pooled)
    estimator = ko.empirical_fisher(lambda p, x, y: pooled(p, x, None).nll(y))
    plan = oracles.plan(estimator.layers(params, x, y))
    (own,), _ = jax.jit(lambda: estimator.at(params, x, y).statistics(plan))()
    _, got = shared(estimator, params, (x, y), None, ko.kronecker())
    for a, b in zip(got, own, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [None, 2])
def test_a_convolution_has_the_mean_patch(sharing, positions):
    """Of equal positions some may be left out."""
    x, kernel, bias = oracles.normal(0, (N, 6, 2)), oracles.normal(1, (3, 2, Q)), jnp.zeros(Q)
    x = x if positions is None else jnp.broadcast_to(x[:, :1], x.shape)

    def losses(params, x):
        s = jax.lax.conv_general_dilated(
            x, params[0], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        s = ko.tap_conv(s + params[1], x, *params, padding="VALID")
        return jnp.square(s).sum((1, 2))

    estimator, params = ko.empirical_fisher(losses), (kernel, bias)
    block = rank_one(sharing=sharing)._replace(positions=positions)
    plan = oracles.plan(estimator.layers(params, x), block=block)
    (means,), _ = jax.jit(lambda: estimator.at(params, x).statistics(plan))()
    patches = np.stack([np.asarray(x)[:, i : i + 3].reshape(N, 6) for i in range(4)], 1)
    np.testing.assert_allclose(means.inputs[0], [*patches.mean((0, 1)), 1], rtol=1e-10)
    of_bias = jax.grad(lambda p: losses(p, x).mean())(params)[1]
    share = 4 if sharing == "expand" else 1
    np.testing.assert_allclose(means.outputs[0], of_bias / share, rtol=1e-10)


def test_rows_that_all_examples_share_count_once():
    """A table of positions: one row has the sum of the examples' output gradients."""
    x, table = oracles.normal(0, (N, T, Q)), oracles.normal(1, (T, Q))

    def losses(table, x):
        positions = ko.tap_embedding(table[jnp.arange(T)], jnp.arange(T), table)
        return jnp.square(x + positions).sum((1, 2))

    estimator = ko.empirical_fisher(losses)
    layers = estimator.layers(table, x)
    plan = Plan(layers.layers, (rank_one(),), None, jnp.float64)
    (means,), _ = jax.jit(lambda: estimator.at(table, x).statistics(plan))()
    gradient = jax.grad(lambda t: losses(t, x).mean())(table)
    np.testing.assert_allclose(means.inputs[0], np.full(T, 1 / T), rtol=1e-12)
    np.testing.assert_allclose(means.outputs[0], gradient.sum(0) / T, rtol=1e-10)


def test_tokens_are_one_hot_inputs():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (N, T)))
    use = Use(dense_layer(5, Q), N, N * T, jnp.float64, some_weights((N, T)))
    g = oracles.normal(1, (N, T, Q))
    got = rank_one().measure(tokens, g, use)
    want = rank_one().measure(jax.nn.one_hot(tokens, 5, dtype=jnp.float64), g, use)
    np.testing.assert_allclose(got.inputs, want.inputs, rtol=1e-12)


def test_estimators_without_losses_say_what_to_use():
    params, x, _ = data(pooled)
    for make in (ko.fisher, ko.ggn, ko.forward_only):
        estimator = make(lambda p, x: pooled(p, x, None))
        tx = ko.eva(estimator.layers(params, x), kl_clip=None)
        curvature = estimator.at(params, x, key=jax.random.key(0))
        with pytest.raises(ValueError, match=rf"{make.__name__}.at: rank one .*empirical_fisher"):
            tx.update(params, tx.init(params), params, curvature=curvature)


def test_products_and_means_do_not_mix():
    params, x, _ = data(pooled)
    layers = ko.ggn(lambda p, x: pooled(p, x, None)).layers(params, x)
    with pytest.raises(ValueError, match="but the coupling .* expected one sort"):
        ko.scale_by_curvature(layers, block=rank_one(), coupling=ko.coarse_correction())
    table, tokens = jnp.ones((5, P)), jnp.zeros((N, T), int)

    def predict(p, tokens):
        embedded = ko.tap_embedding(p["table"][tokens], tokens, p["table"])
        return ko.Normal(layer(p, embedded).mean(1))

    layers = ko.ggn(predict).layers({"table": table, **params}, tokens)
    with pytest.raises(ValueError, match=r"but table \(embedding \(eigh\)\) their products"):
        ko.scale_by_curvature(layers, block=blocks_of(rank_one()))
    with pytest.raises(ValueError, match=r"coverage: rank one averages"):
        ko.coverage(layers, block=rank_one())


def test_errors():
    with pytest.raises(ValueError, match="expected one of 'expand', 'reduce'"):
        rank_one(sharing="sum")
    use = Use(dense_layer(1, Q), N, N, jnp.float64)
    with pytest.raises(ValueError, match="inputs of size 3; expected 1"):
        rank_one().measure(jnp.ones((N, 3)), jnp.ones((N, 3)), use)
    with pytest.raises(ValueError, match="no output gradients.*eva_f"):
        rank_one().measure(jnp.ones((N, 1)), None, use)


def test_vanishing_means_leave_the_gradient():
    means, v = Means(jnp.zeros(P), jnp.zeros(Q)), oracles.normal(0, (P, Q))
    np.testing.assert_allclose(rank_one().solve(means, v, LAM), v / LAM, rtol=1e-12)
