"""Functions with a derivative rule of their own: rule and gradient stay exact, and what is inside
is not measured.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax._tree import named_leaves
from tests import oracles
from tests.helpers import dense

N = 6

pytestmark = pytest.mark.usefixtures("x64")


def tanh_layer(w, x):
    return jnp.tanh(dense(x, w))


@jax.custom_vjp
def reversal(w, x):
    """The gradient changes its sign on the way back."""
    return tanh_layer(w, x)


reversal.defvjp(
    lambda w, x: (reversal(w, x), (w, x)),
    lambda kept, g: jax.tree.map(jnp.negative, jax.vjp(lambda w, x: jnp.tanh(x @ w), *kept)[1](g)),
)


@jax.custom_jvp
def straight_through(w, x):
    """Rounded forward, derivative of the layer that is not."""
    return jnp.round(4 * dense(x, w)) / 4


straight_through.defjvp(
    lambda at, d: (straight_through(*at), jax.jvp(lambda w, x: x @ w, at, d)[1])
)


@jax.custom_gradient
def half_gradient(w, x):
    out, pull = jax.vjp(tanh_layer, w, x)
    return out, lambda g: jax.tree.map(lambda c: c / 2, pull(g))


@jax.custom_vjp
def scaled(w):
    """The identity, with a third of the gradient: the layer behind it sees the parameter as stored."""
    return w


scaled.defvjp(lambda w: (w, None), lambda _, g: (g / 3,))


def in_a_scan(w, x):
    return jax.lax.scan(
        lambda c, _: (reversal(w, c @ w.T), None), tanh_layer(w, x), None, length=2
    )[0]


def beside_a_layer_in_a_scan(w, x):
    body = lambda c, _: (jax.checkpoint(reversal)(w, tanh_layer(w, c) @ w.T) @ w.T, None)
    return tanh_layer(w, jax.lax.scan(body, x, None, length=2)[0])


def of_one_example(w, x):
    return jax.vmap(straight_through, (None, 0))(w, x)


def solved(w, x):
    """`(w w^T + 9 I) y = x`: the layer runs inside the solver."""
    product = lambda y: y @ w @ w.T + 9 * y
    solve = lambda f, b: jax.scipy.sparse.linalg.cg(f, b, maxiter=50, tol=1e-14)[0]
    return (
        jax.lax.custom_linear_solve(
            lambda y: product(dense(y, jnp.eye(3))), x, solve, symmetric=True
        )
        @ w
    )


def tapped_solve(w, x):
    square = w @ w.T + 9 * jnp.eye(3)
    product = lambda y: ko.tap_dense(y @ w, y, w) @ w.T + 9 * y
    solve = lambda _, b: jnp.linalg.solve(square, b.T).T
    return jax.lax.custom_linear_solve(product, x, solve, solve) @ w


def root(w, x):
    """The fixed point of a contraction, differentiated implicitly."""
    residual = lambda z: jnp.tanh(z @ (0.1 * w @ w.T) + x) - z
    iterate = lambda f, z: jax.lax.fori_loop(0, 60, lambda _, z: z + f(z), z)

    def linear(g, y):
        jacobian = jax.jacobian(g)(jnp.zeros_like(y)).reshape(y.size, y.size)
        return jnp.linalg.solve(jacobian, y.ravel()).reshape(y.shape)

    return jax.lax.custom_root(lambda z: residual(dense(z, jnp.eye(3))), x, iterate, linear) @ w


RULES = {
    "custom_vjp": reversal,
    "custom_jvp": straight_through,
    "custom_gradient": half_gradient,
    "around the parameter": lambda w, x: tanh_layer(scaled(w), x),
    "in jit": jax.jit(reversal),
    "in remat": jax.checkpoint(straight_through),
    "in vmap": of_one_example,
    "in scan": in_a_scan,
    "in scan, beside a layer": beside_a_layer_in_a_scan,
    "in a linear solve": solved,
    "tapped in a linear solve": tapped_solve,
    "in a root": root,
}


# what is also used outside the rule
PARTLY = {
    "in scan": "custom_vjp `reversal`",
    "in scan, beside a layer": "custom_vjp `reversal`",
    "in a linear solve": "custom_linear_solve",
    "tapped in a linear solve": "custom_linear_solve",
    # JAX 0.12 has a primitive of its own for it
    "in a root": "custom_jvp" if jax.__version_info__ < (0, 12) else "custom_rule `CustomRoot`",
}


@functools.cache
def problem():
    params = {"a": oracles.normal(0, (3, 4)), "b": oracles.normal(1, (4, 2))}
    return params, oracles.normal(2, (N, 3)), oracles.normal(3, (N, 2))


@pytest.mark.parametrize("name", RULES)
def test_the_rule_is_kept_and_what_is_inside_is_not_covered(name):
    params, x, y = problem()
    predict = lambda p, x: ko.Normal(dense(RULES[name](p["a"], x), p["b"]))
    want = jax.jit(jax.value_and_grad(lambda p: predict(p, x).mean_nll(y)))(params)
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x)
    assert [layer.kernel for layer in layers] == (["a", "b"] if name in PARTLY else ["b"])
    if name in PARTLY:
        assert f"also used by {PARTLY[name]}" in layers.layers[0].notes[0]
    else:
        (left,) = layers.uncovered
        assert left.path == "a" and ("custom" in left.reason)

    def step(p):
        loss, grads, curvature = estimator.value_and_grad(lambda d, y: d.mean_nll(y))(
            p, x, targets=y
        )
        return loss, grads, curvature.statistics(oracles.plan(layers))[0][-1]

    loss, grads, factors = jax.jit(step)(params)
    np.testing.assert_allclose(loss, want[0], rtol=1e-12)
    for path, g in named_leaves(grads).items():
        np.testing.assert_allclose(g, want[1][path], rtol=1e-10, atol=1e-12, err_msg=path)
    hidden = RULES[name](params["a"], x)
    np.testing.assert_allclose(factors.inputs[0], hidden.T @ hidden / N, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(factors.outputs[0], np.eye(2), atol=1e-12)


def test_the_reason_names_the_rule():
    params, x, _ = problem()
    layers = ko.ggn(lambda p, x: ko.Normal(dense(reversal(p["a"], x), p["b"]))).layers(params, x)
    assert layers.uncovered[0].reason == "inside custom_vjp `reversal`: its own derivative rule"
    with pytest.raises(ValueError, match="inside custom_vjp `reversal`: its own derivative rule"):
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")
    with pytest.raises(ValueError, match="no layer left.* a .*inside custom_vjp `reversal`"):
        ko.ggn(lambda p, x: ko.Normal(reversal(p["a"], x))).layers(params, x)


def test_diagonal_measures_through_the_rule():
    """The derivative that counts is that of the rule: a third of the layer's, so a ninth of its
    second moment.
    """
    params, x, _ = problem()
    x = x[:1]  # of one example no signs are needed
    predict = lambda p, x: ko.Normal(dense(tanh_layer(scaled(p["a"]), x), p["b"]))
    estimator = ko.ggn(predict)
    tx = ko.kfac(
        estimator.layers(params, x), learning_rate=1.0, uncovered="diagonal", bound="damped"
    )
    _, state = tx.update(params, tx.init(params), params, curvature=estimator.at(params, x))
    jacobian = jax.jacrev(lambda a: predict({**params, "a": a}, x).mean)(params["a"])
    want = np.sum(np.square(jacobian), (0, 1)).reshape(1, 1, -1)
    np.testing.assert_allclose(state.preconditioner.factors["diagonal_1x12"], want, rtol=1e-12)


def test_activations_of_jax_stay_transparent():
    params, x, _ = problem()
    for activation in (
        jax.nn.relu,
        jax.nn.silu,
        jax.nn.softplus,
        jax.nn.softmax,
        jax.nn.logsumexp,
        jax.nn.gelu,
    ):
        hidden = lambda p, x: activation(dense(x, p["a"])) + jnp.zeros((N, 4))
        for wrap in (lambda f: f, jax.checkpoint, jax.jit):
            layers = ko.ggn(lambda p, x: ko.Normal(dense(wrap(hidden)(p, x), p["b"]))).layers(
                params, x
            )
            assert not layers.uncovered and not any(layer.notes for layer in layers)


def test_what_is_behind_stop_gradient_is_no_use():
    """A target network: constants with the values of parameters."""
    params, x, _ = problem()
    network = lambda p, x: dense(jnp.tanh(dense(x, p["a"])), p["b"])
    predict = lambda p, x: ko.Normal(network(p, x) - network(jax.lax.stop_gradient(p), 2 * x))
    alone = lambda p, x: ko.Normal(network(p, x))
    got, want = (
        estimator.at(params, x).statistics(oracles.plan(estimator.layers(params, x)))[0]
        for estimator in map(ko.ggn, (predict, alone))
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    frozen = lambda p, x: ko.Normal(
        dense(jnp.tanh(dense(x, jax.lax.stop_gradient(p["a"]))), p["b"])
    )
    layers = ko.ggn(frozen).layers(params, x)
    assert [(u.path, u.reason) for u in layers.uncovered] == [
        ("a", "only used behind stop_gradient, or for integers and flags")
    ]


def test_a_product_with_its_own_rule_is_noted_at_its_tap():
    """A quantised product, say: the tap sees its output, the rule decides what becomes of the
    gradient.
    """

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g / 2))
    params, x, _ = problem()
    predict = lambda p, x: ko.Normal(dense(ko.tap_dense(product(x, p["a"]), x, p["a"]), p["b"]))
    first, second = ko.ggn(predict).layers(params, x)
    assert first.notes == (
        "a used through custom_vjp `product`: its own derivative rule, not measured",
    )
    assert second.notes == ()


@pytest.mark.parametrize("rule", [reversal, half_gradient])
def test_products_follow_the_rule_of_the_way_back(rule):
    """A function with `custom_vjp` has no derivative forward: `J v` is `J^T`, transposed."""
    params = {"a": oracles.normal(0, (3, 4)), "b": oracles.normal(1, (4, 2))}
    x = oracles.normal(2, (N, 3))
    model = lambda p: rule(p["a"], x) @ p["b"]
    predict = lambda p, x: ko.Normal(rule(p["a"], x) @ p["b"])
    vector = {"a": oracles.normal(3, (3, 4)), "b": oracles.normal(4, (4, 2))}
    jacobian = jax.jacrev(model)(params)
    along = sum(jnp.tensordot(jacobian[k], vector[k], 2) for k in params)
    expected = {k: jnp.tensordot(along, jacobian[k], 2) / N for k in params}
    got = jax.jit(ko.ggn(predict).vector_product)(params, vector, x)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10)
    jax.tree.map(close, got, expected)
    (rows,) = ko.ggn(predict).at(params, x).linearize().jvp(vector)
    close(np.sum(np.square(rows)), jnp.vdot(along, along))


@pytest.mark.parametrize(
    "rule",
    [
        lambda g: jnp.clip(g, -1, 1),
        lambda g: g / jnp.linalg.norm(g),
        lambda g: jnp.where(g > 0, g, 0),
        jax.lax.stop_gradient,
    ],
)
def test_a_rule_that_cannot_be_transposed_has_no_products(rule):
    @jax.custom_vjp
    def changed(x):
        return x

    changed.defvjp(lambda x: (x, None), lambda _, g: (rule(g),))
    predict = lambda w, x: ko.Normal(changed(x @ w))
    w, x = jnp.eye(3), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="backward rule of a custom_vjp.*linear in the cotangent"):
        ko.ggn(predict).vector_product(w, w, x)
    with pytest.raises(ValueError, match="backward rule of a custom_vjp"):
        ko.ggn(predict).at(w, x).linearize().jvp(w)
