"""Uses of parameters that are easily measured wrong, in nets of random sizes: gradients, products
and statistics against dense matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import oracles

pytestmark = pytest.mark.usefixtures("x64")
DRAWS = 4000


@jax.custom_vjp
def reversed_layer(w, x):
    """The gradient changes its sign on the way back, around a layer."""
    return jnp.tanh(x @ w)


reversed_layer.defvjp(
    lambda w, x: (reversed_layer(w, x), (w, x)),
    lambda kept, g: jax.tree.map(jnp.negative, jax.vjp(lambda w, x: jnp.tanh(x @ w), *kept)[1](g)),
)


def own_rule(p, x):
    return reversed_layer(p["a"], x) @ p["b"]


def laplacian(p, x):
    network = lambda z: (jnp.tanh(z @ p["a"]) @ p["b"]).sum()
    return jax.vmap(lambda z: jnp.trace(jax.hessian(network)(z)))(x)[:, None]


def two_parts(p, x):
    """Amplitude and phase of `log psi`."""
    z = jnp.log(jnp.cosh((x @ p["a"]) * (1 + 0.5j))) @ p["b"].astype(complex)
    return jnp.concatenate([z.real, z.imag], 1)


def centred(p, x):
    out = jnp.tanh(x @ p["a"]) @ p["b"]
    return out - out.mean(0)


MODELS = [own_rule, laplacian, two_parts, centred]


def problem(seed):
    """Parameters and inputs whose sizes the seed draws."""
    examples, inputs, hidden, outputs = np.random.default_rng(seed).integers(2, 6, 4)
    params = {
        "a": oracles.normal(seed, (inputs, hidden)),
        "b": oracles.normal(seed + 1, (hidden, outputs)),
    }
    return params, oracles.normal(seed + 2, (examples, inputs))


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_and_products_are_dense(model, seed):
    params, x = problem(seed)
    vector = jax.tree.map(lambda v: oracles.normal(seed + 3, v.shape), params)
    targets = oracles.normal(seed + 4, model(params, x).shape)
    estimator = ko.ggn(lambda p, x: ko.Normal(model(p, x)))

    @jax.jit
    def both(p):
        _, grads, _ = estimator.value_and_grad(lambda d, y: d.mean_nll(y))(p, x, targets=targets)
        return grads, estimator.vector_product(p, vector, x), jax.jacrev(model)(p, x)

    grads, product, jacobian = both(params)
    flat = {name: np.reshape(j, (targets.size, -1)) for name, j in jacobian.items()}
    along = sum(j @ np.ravel(vector[name]) for name, j in flat.items())
    error = np.ravel(model(params, x) - targets)
    for name, j in flat.items():
        for got, row in ((grads, error), (product, along)):
            want = (row @ j).reshape(params[name].shape) / len(x)
            np.testing.assert_allclose(got[name], want, rtol=1e-9, atol=1e-11)


def mean_statistics(estimator, params, x):
    """Of the only layer, `A` and `G` of many steps without a key."""
    plan = oracles.plan(estimator.layers(params, x))
    run = lambda count: estimator.at(params, x).statistics(plan._replace(count=count))[0]
    ((factors, *_),) = [jax.jit(jax.vmap(run))(jnp.arange(DRAWS))]
    return factors.inputs.mean((0, 1)), factors.outputs.mean((0, 1))


@pytest.mark.parametrize("seed", [0, 10])
def test_rows_that_all_examples_share_are_scaled_right(seed):
    """`tr A tr G` is the mean over examples of the squared rows of their gradients, where the rows
    are orthogonal.
    """
    params, x = problem(seed)
    rows = len(params["a"])

    def one(p, x, shift):
        hidden = jnp.tanh(jnp.eye(rows) @ p + shift)
        return jnp.sum(jnp.cosh(x)) * (hidden.T @ jnp.arange(1.0, rows + 1)).sum()

    predict = lambda p, x: ko.Normal(jax.vmap(lambda z: one(p, z, 0.0))(x)[:, None])
    inputs, outputs = mean_statistics(ko.ggn(predict), params["a"], x)
    slope = jax.vmap(lambda z: jax.grad(lambda s: one(params["a"], z, s))(0 * params["a"]))(x)
    want = np.einsum("nri,nrj->ij", slope, slope) / len(x)
    # A is the identity: of the sum over rows G is the whole
    scale = np.trace(inputs) / rows
    np.testing.assert_allclose(inputs, scale * np.eye(rows), atol=1e-12)
    np.testing.assert_allclose(rows * scale * outputs, want, atol=0.1 * np.abs(want).max())


@pytest.mark.parametrize("seed", [0, 10])
def test_centred_scores_have_the_covariance_of_the_rows(seed):
    """`A (x) G` has the trace of the covariance where rows are alike: `G = 1 - 1/N`."""
    params, x = problem(seed)
    only_centred = lambda out: out - out.mean(0)
    predict = lambda w, x: ko.Normal(only_centred(x @ w))
    inputs, outputs = mean_statistics(ko.ggn(predict), params["a"], x)
    n, q = len(x), params["a"].shape[1]
    np.testing.assert_allclose(inputs, x.T @ x / n, rtol=1e-12)
    np.testing.assert_allclose(outputs, (1 - 1 / n) * np.eye(q), atol=0.06)


@pytest.mark.parametrize("seed", [0, 10])
def test_left_over_parameters_have_their_diagonal_without_a_key(seed):
    params, x = problem(seed)
    params = {"s": jnp.ones(x.shape[1]), "w": jnp.ones((x.shape[1], 1))}
    predict = lambda p, x: ko.Normal(jnp.cos(x) @ p["w"] + (x @ jnp.sin(p["s"]))[:, None])
    estimator = ko.ggn(predict)
    tx = ko.scale_by_curvature(
        estimator.layers(params, x),
        block=ko.kronecker(),
        damping=0.0,
        uncovered="diagonal",
        decay=1.0,
    )

    def step(state, _):
        at = estimator.at(params, x)
        return tx.update(params, state, params, curvature=at, refresh=False)[1], None

    state, _ = jax.jit(lambda: jax.lax.scan(step, tx.init(params), None, length=DRAWS))()
    name = f"diagonal_1x{x.shape[1]}"
    want = np.mean(x**2, 0) * np.cos(1) ** 2
    np.testing.assert_allclose(state.factors[name].ravel(), want, rtol=0.12)
