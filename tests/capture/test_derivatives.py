"""Models whose output is a derivative of the network in its inputs: what it makes of the layers is
measured as further uses of theirs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import oracles
from tests.layers.gradients import assert_gradients

N = 5


class Network(nn.Module):
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(3, name="first")(x))
        if self.scanned:
            body = lambda cell, x, _: (nn.tanh(cell(x)), None)
            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = scan(nn.Dense(3, name="middle"), x, None)
        else:
            x = nn.tanh(nn.LayerNorm(name="middle")(x))
        return nn.Dense(1, name="last")(x)[..., 0]


def wide(params, x):
    return jax.tree.map(lambda v: v.astype(jnp.float64), (params, x))


def laplacian(f, x):
    return jnp.trace(jax.hessian(f)(x))


OUTPUTS = {
    "hessian": laplacian,
    "grad": lambda f, x: jax.grad(f)(x).sum(),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,))[1],
    "jit": lambda f, x: jax.jit(jax.grad(f))(x).sum(),
    "remat": lambda f, x: jax.grad(jax.checkpoint(f))(x).sum(),
    "linear transpose": lambda f, x: jax.linear_transpose(jax.linearize(f, x)[1], x)(1.0)[0].sum(),
}


def problem(output, scanned=False):
    network, x = Network(scanned), oracles.normal(0, (N, 2)).astype(jnp.float32)
    params = network.init(jax.random.key(0), x)["params"]
    values = lambda p, x: jax.vmap(lambda z: output(lambda z: network.apply({"params": p}, z), z))(
        x
    )
    return values, ko.ggn(lambda p, x: ko.Normal(values(p, x)[:, None])), params, x


@pytest.mark.parametrize("scanned", [False, True], ids=["", "scan over layers"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_use_in_a_derivative_is_measured(x64, name, scanned):
    """`sum a g^T` over layer, tangents and cotangents is the gradient of every parameter."""
    values, _, params, x = problem(OUTPUTS[name], scanned)
    layers = assert_gradients(
        lambda p, x: (values(p, x) - 1) ** 2 / 2,
        *wide(params, x),
        uncovered=["last/bias"],  # a derivative does not depend on it
        rtol=1e-10,
    )
    reasons = {u.path: u.reason for u in layers.uncovered}
    assert reasons == {"last/bias": "not used"}
    assert not any(layer.partly for layer in layers)
    ko.kfac(layers, learning_rate=0.1)


def test_value_and_derivative_together(x64):
    """Sobolev training: rows of the value, with bias, and rows of the derivative, without."""
    both = lambda f, x: jnp.sum(jax.value_and_grad(f)(x)[1]) + f(x)
    values, _, params, x = problem(both)
    layers = assert_gradients(
        lambda p, x: (values(p, x) - 1) ** 2 / 2, *wide(params, x), rtol=1e-10
    )
    assert {layer.path: (layer.mixed, layer.swapped) for layer in layers} == {
        "first": (True, True),
        "middle/scale": (False, False),
        "middle/bias": (False, False),
        "last": (True, True),
    }


def plain_network(params, z):
    hidden = jnp.tanh(z @ params["first"]["w"] + params["first"]["b"])
    return (hidden @ params["last"]["w"])[0]


def plain_params():
    first = {"w": oracles.normal(0, (2, 6)), "b": 0.3 * oracles.normal(1, (6,))}
    return {"first": first, "last": {"w": oracles.normal(2, (6, 1)) / 2}}


def test_the_blocks_of_a_laplacian_point_where_the_exact_ones_do(x64):
    """Of a net for a partial differential equation: cosine to the blocks of the exact matrix, and
    their trace.
    """
    params, x = plain_params(), oracles.normal(3, (12, 2))
    values = lambda p, x: jax.vmap(lambda z: laplacian(lambda z: plain_network(p, z), z))(x)
    estimator = ko.ggn(lambda p, x: ko.Normal(values(p, x)[:, None]))
    layers = estimator.layers(params, x)
    plan = oracles.plan(layers)

    @jax.jit
    def measured(counts):
        step = lambda count: estimator.at(params, x).statistics(plan._replace(count=count))[0]
        return jax.tree.map(lambda v: v.mean((0, 1)), jax.lax.map(step, counts))

    for layer, factors in zip(layers, measured(jnp.arange(100)), strict=True):
        exact = oracles.dense_block(estimator, params, (x,), layer)
        got = np.kron(factors.inputs, factors.outputs)
        cosine = np.sum(got * exact) / np.linalg.norm(got) / np.linalg.norm(exact)
        assert cosine > 0.6, (layer.path, cosine)
        assert 0.5 < np.trace(got) / np.trace(exact) < 2, layer.path


def test_rows_of_a_use_the_other_way_round_are_balanced(x64):
    """No outer product changes, and `tr(A) tr(G)` is the sum of their squares."""
    params, x = {"w": oracles.normal(0, (3, 2))}, oracles.normal(1, (N, 3))
    estimator = ko.ggn(lambda p, x: ko.Normal(jnp.tanh(x @ p["w"]) @ p["w"].T))
    layers = estimator.layers(params, x)
    (layer,) = layers
    assert (layer.swapped, layer.uses, layer.rows) == (True, 2, 2 * N)
    plan = oracles.plan(layers)
    factors = jax.jit(lambda x: estimator.at(params, x).statistics(plan)[0][0])(x)
    rows = laid_out_rows(params["w"], x)
    squares = sum(np.einsum("cnp,cnq->cn", a**2, g**2).sum() for a, g in rows) / N
    np.testing.assert_allclose(
        np.trace(factors.inputs[0]) * np.trace(factors.outputs[0]), squares, rtol=1e-10
    )


def laid_out_rows(w, x):
    """`(a, g)` of both uses of `tanh(x w) w^T`, for every output column."""
    hidden = jnp.tanh(x @ w)
    columns = jnp.broadcast_to(jnp.eye(3)[:, None], (3, len(x), 3))
    inner = jnp.einsum("cnp,pq->cnq", columns, w) * (1 - hidden**2)
    first = jnp.broadcast_to(x, (3, *x.shape)), inner
    return [first, (columns, jnp.broadcast_to(hidden, (3, *hidden.shape)))]


def test_a_layer_without_part_in_the_prediction_is_not_used():
    def predict(p, x):
        dead = ko.tap_dense(x @ p["dead"], x, p["dead"])
        del dead
        return ko.Normal(ko.tap_dense(x @ p["kernel"], x, p["kernel"]))

    params = {"dead": jnp.ones((2, 3)), "kernel": jnp.ones((2, 1))}
    layers = ko.ggn(predict).layers(params, jnp.ones((N, 2)))
    assert [layer.kernel for layer in layers] == ["kernel"]
    assert [(u.path, u.reason) for u in layers.uncovered] == [("dead", "not used")]


def test_a_parameter_that_is_handed_out_or_carried_is_used():
    """As the scale of a head, or as the start of a loop: no equation of its own, and yet no
    parameter without use.
    """

    def predict(p, x):
        start, _ = jax.lax.scan(lambda c, _: (2 * c, None), p["start"], None, length=3)
        mean = ko.tap_dense(x @ p["kernel"], x, p["kernel"]) + start
        return ko.Normal(mean, jnp.broadcast_to(p["scale"], mean.shape))

    params = {"kernel": jnp.ones((2, 3)), "scale": jnp.ones(3), "start": jnp.ones(3)}
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, jnp.ones((N, 2)))
    reasons = {u.path: u.reason for u in layers.uncovered}
    assert "the prediction itself" in reasons["scale"] and "scan" in reasons["start"]
    tx = ko.kfac(layers, learning_rate=0.1, uncovered="diagonal", bound="damped")
    _, state = tx.update(
        params, tx.init(params), params, curvature=estimator.at(params, jnp.ones((N, 2)))
    )
    assert "diagonal_1x3" in state.preconditioner.factors


def test_what_is_returned_besides_predictions_measures_nothing(x64):
    """Features of other data, handed out next to the prediction by the same layers: no rows of
    theirs.
    """
    params = {"a": oracles.normal(0, (2, 3)), "b": oracles.normal(1, (3, 1))}
    x, other = oracles.normal(2, (N, 2)), oracles.normal(3, (N, 2))
    dense = lambda x, w: ko.tap_dense(x @ w, x, w)
    network = lambda p, x: dense(jnp.tanh(dense(x, p["a"])), p["b"])
    estimator = ko.ggn(
        lambda p, x, other: (ko.Normal(network(p, x)), network(p, 9 * other)), has_aux=True
    )
    plan = oracles.plan(estimator.layers(params, x, other))

    @jax.jit
    def shared(p):
        step = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        (_, aux), grads, curvature = step(p, x, other, targets=jnp.ones((N, 1)))
        return aux, grads, curvature.statistics(plan)[0]

    aux, grads, got = shared(params)
    np.testing.assert_allclose(aux, network(params, 9 * other), rtol=1e-12)
    want = jax.grad(lambda p: ko.Normal(network(p, x)).mean_nll(jnp.ones((N, 1))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), grads, want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10),
        got,
        estimator.at(params, x, other).statistics(plan)[0],
    )
