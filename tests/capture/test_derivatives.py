"""Models whose output is a derivative of the network in its inputs: what the taps do not see is
named.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._tree import named_leaves
from tests import oracles

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
def test_no_use_besides_the_tap_is_silent(name, scanned):
    """Every parameter with a derivative of the output in it is covered without a note, noted, or
    left out by name.
    """
    values, estimator, params, x = problem(OUTPUTS[name], scanned)
    layers = estimator.layers(params, x)
    noted = {layer.path: layer.notes for layer in layers}
    middle = "middle/kernel" if scanned else "middle/scale"
    assert set(noted) == {"first", "middle"}
    assert noted["first"] == ("kernel also used by dot_general: not measured",)
    assert noted["middle"][0].startswith(f"{middle.rpartition('/')[2]} also used by ")
    reasons = {u.path: u.reason for u in layers.uncovered}
    assert (
        reasons["last/kernel"].startswith("only used by ")
        and "a derivative of it" in reasons["last/kernel"]
    )
    gradients = named_leaves(jax.grad(lambda p: jnp.sum(values(p, x) ** 2))(params))
    unused = [path for path, reason in reasons.items() if reason == "not used"]
    assert unused == ["last/bias"]
    for path, g in gradients.items():  # and nothing that matters is called unused
        assert (np.abs(g).max() > 0) == (path not in unused), path


def test_the_bypassed_layer_raises_or_passes():
    """Of a Laplacian, the last kernel: its tap would measure G = 0."""
    values, estimator, params, x = problem(laplacian)
    layers, at = estimator.layers(params, x), estimator.at(params, x)
    with pytest.raises(
        ValueError, match="last/kernel .*: only used by dot_general, not by the output of its layer"
    ):
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")
    grads = jax.grad(lambda p: jnp.mean((values(p, x) - 1) ** 2) / 2)(params)
    tx = ko.kfac(layers, learning_rate=0.1, kl_clip=None)
    updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p, curvature=at))(grads, params)
    np.testing.assert_allclose(updates["last"]["kernel"], grads["last"]["kernel"], rtol=0)


def test_measured_alone_it_has_the_diagonal_of_its_block(x64):
    """Of one example, where no random sign takes part: the squared derivative of the Laplacian."""
    values, estimator, params, x = problem(laplacian)
    params, x = jax.tree.map(lambda v: v.astype(jnp.float64), (params, x[:1]))
    tx = ko.kfac(estimator.layers(params, x), learning_rate=0.1, uncovered="diagonal")
    _, state = jax.jit(lambda p: tx.update(p, tx.init(p), p, curvature=estimator.at(p, x)))(params)
    want = jax.grad(lambda p: values(p, x)[0])(params)["last"]["kernel"] ** 2
    np.testing.assert_allclose(
        state.preconditioner.factors["diagonal_1x3"].ravel(), want.ravel(), rtol=1e-10
    )


def test_value_and_derivative_together_note_every_kernel():
    """Sobolev training: all layers have a part in the value, so all are measured, in part."""
    both = lambda f, x: jnp.sum(jax.value_and_grad(f)(x)[1]) + f(x)
    _, estimator, params, x = problem(both)
    layers = estimator.layers(params, x)
    assert not layers.uncovered
    assert [layer.path for layer in layers if layer.notes] == ["first", "middle", "last"]


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
    tx = ko.kfac(layers, learning_rate=0.1, uncovered="diagonal")
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
