"""Parameters of which layers have parts: what none has is treated as a parameter on its own would be.

One model twice: a matrix of which two layers have a part each while the rest has another use, and
the same three stored apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._parts import boxes_left, size_of
from kfac_optax._types import Layer, Layout, Part
from tests.layers.gradients import squares

N = 5


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape)


X = normal(N, 3)


def network(first, second, rest, last, x):
    hidden = jnp.tanh(x @ first) @ last
    return (hidden + x @ second) * jnp.exp(jnp.sum(rest**2) / 20)


def shared(p, x):
    w = p["w"]
    return network(w[:, :3], w[:, 3:5], w[:, 5:], p["last"], x)


def stored_apart(p, x):
    return network(p["first"], p["second"], p["rest"], p["last"], x)


def split(p):
    w = p["w"]
    return {"first": w[:, :3], "second": w[:, 3:5], "rest": w[:, 5:], "last": p["last"]}


SHARED = {"w": normal(3, 7) / 2, "last": normal(3, 2)}
KFAC = {"learning_rate": 0.3, "damping": 0.01, "kl_clip": 1e-3}


def preconditioned(layers, rule, **options):
    fine = ko.scale_by_curvature(layers, block=ko.kronecker(), damping=0.01)
    return rule(fine, layers=layers, **options)


METHODS = {
    "pass": lambda layers: ko.kfac(layers, uncovered="pass", **KFAC),
    "graft": lambda layers: ko.kfac(layers, uncovered="graft", **KFAC),
    "diagonal": lambda layers: ko.kfac(layers, uncovered="diagonal", **KFAC),
    "two-level": lambda layers: ko.kfac_two_level(layers, uncovered="pass", **KFAC),
    "deflated": lambda layers: ko.kfac(layers, coupling=ko.deflated(), uncovered="pass", **KFAC),
    "trust region": lambda layers: preconditioned(
        layers, ko.clip_by_trust_region, learning_rate=0.3, metric="exact"
    ),
    "root mean square": lambda layers: preconditioned(layers, ko.clip_by_rms, max_rms=1e-3),
    "norm": lambda layers: preconditioned(layers, ko.graft_norm, norm_of=optax.scale_by_adam()),
    "pairs": lambda layers: ko.k_bfgs(layers, learning_rate=0.3, damping=0.1),
}


def estimated(model, name):
    losses = lambda p, x: squares(model(p, x))
    if name == "pairs":
        return ko.empirical_fisher(losses)
    return ko.ggn(lambda p, x: ko.Normal(model(p, x)))


def update(name, model, params, poison=lambda gradient: gradient):
    estimator = estimated(model, name)
    tx = METHODS[name](estimator.layers(params, X))

    @jax.jit
    def step(params):
        gradient = jax.grad(lambda p: squares(model(p, X)).mean())(params)
        at = estimator.at(params, X)
        return tx.update(poison(gradient), tx.init(params), params, curvature=at)[0]

    return step(params)


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-14), got, want)


@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_that_of_the_rest_stored_apart(x64, name):
    params = jax.tree.map(jnp.asarray, SHARED)
    got, want = update(name, shared, params), update(name, stored_apart, split(params))
    assert np.abs(want["rest"]).max() > 0
    assert_close(split(got), want)


@pytest.mark.parametrize("where", [(0, 0), (0, 6)], ids=["a part", "the rest"])
def test_a_gradient_that_is_not_finite_leaves_the_whole_update_out(where):
    poison = lambda gradient: gradient | {"w": gradient["w"].at[where].set(jnp.nan)}
    got = update("two-level", shared, jax.tree.map(jnp.asarray, SHARED), poison)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), got)


def test_a_posterior_fixes_the_rest(x64):
    """As `uncovered="pass"` fixes a parameter."""

    def of(model, params):
        estimator = ko.ggn(lambda p, x: ko.Normal(model(p, x)))
        return ko.laplace(estimator, params, [(X,)], uncovered="pass")

    params = jax.tree.map(jnp.asarray, SHARED)
    got, want = of(shared, params), of(stored_apart, split(params))
    vector = jax.tree.map(jnp.cos, params)
    product = split(got.covariance_product(vector))
    assert_close(product, want.covariance_product(split(vector)))
    np.testing.assert_array_equal(product["rest"], 0)
    np.testing.assert_allclose(got.log_evidence(0.7), want.log_evidence(0.7), rtol=1e-10)
    drawn = got.sample(jax.random.key(0), 2)["w"]
    np.testing.assert_array_equal(drawn[..., 5:], jnp.broadcast_to(params["w"][:, 5:], (2, 3, 2)))
    assert (drawn[..., :5] != params["w"][:, :5]).all()


def test_an_inverse_product_passes_the_rest_on_once(x64):
    """With a coupling too, of which the update has two parts."""
    params = jax.tree.map(jnp.asarray, SHARED)
    estimator = estimated(shared, "two-level")
    layers, at = estimator.layers(params, X), estimator.at(params, X)
    coupling = ko.coarse_correction()
    tx = ko.scale_by_curvature(layers, block=ko.kronecker(), coupling=coupling, damping=0.01)
    _, state = tx.update(params, tx.init(params), params, curvature=at)
    got = ko.inverse_product(layers, state, params, coupling=coupling, curvature=at)
    np.testing.assert_array_equal(got["w"][:, 5:], params["w"][:, 5:])


def test_what_is_left_of_boxes():
    """Against a mask, parts behind the axis of a stack among them."""
    shape = (2, 5, 4)
    boxes = [((0, 1, 0), (2, 2, 4)), ((1, 3, 1), (1, 2, 3)), ((0, 0, 3), (1, 1, 1))]
    parts = [Part(shape, *box) for box in boxes]
    stacked = Part((5, 4), (0, 0), (1, 2))
    layout = Layout((1, 1), (1, 1), (0, 1))
    layers = [Layer("w", "dense", "w", None, 1, 1, layout, part=part) for part in parts]
    layers.append(Layer("w", "dense", "w", None, 1, 1, layout, stack=(2,), part=stacked))
    counts = np.zeros(shape, int)
    for layer in layers:
        counts[layer.box(layer.part)] += 1
    left = boxes_left(layers)["w"]
    for box in left:
        counts[box.slices] += 1
    np.testing.assert_array_equal(counts, 1)
    assert size_of(left) == 40 - 16 - 6 - 1 - 4
