"""Complex numbers: refused at heads, named at parameters, harmless inside a model whose layers and
heads are real.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from tests import oracles
from tests.helpers import dense

pytestmark = pytest.mark.usefixtures("x64")
N = 6


def log_psi(w, x):
    """Amplitude and phase of a wave function."""
    return jax.lax.complex(*dense(x, w).T)


def rbm(p, x):
    h = jnp.log(jnp.cosh(dense(x.astype(complex), p["w"]) + p["b"]))
    return dense(jnp.concatenate([h.real, h.imag], 1), p["head"])


def problem():
    draw = lambda seed, shape: oracles.normal(seed, shape) + 1j * oracles.normal(seed + 9, shape)
    params = {
        "w": 0.3 * draw(0, (3, 4)),
        "b": 0.3 * draw(1, (4,)),
        "head": oracles.normal(2, (8, 1)),
    }
    return params, oracles.normal(3, (N, 3))


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (lambda z: ko.Normal(z), "Normal: mean is complex128"),
        (lambda z: ko.Normal(z.real, z), "Normal: scale is complex128"),
        (lambda z: ko.Categorical(z), "Categorical: logits is complex128"),
        (lambda z: ko.Bernoulli(z), "Bernoulli: logits is complex128"),
    ],
)
def test_a_complex_head_is_refused_with_the_way_out(head, named):
    w, x = oracles.normal(0, (3, 2)), oracles.normal(1, (N, 3))
    for make in (ko.ggn, ko.fisher, ko.forward_only):
        with pytest.raises(TypeError, match=rf"{named}\[6, 1\].*stack\(\[z.real, z.imag\], -1\)"):
            make(lambda w, x: head(log_psi(w, x)[:, None])).layers(w, x)
    with pytest.raises(
        TypeError,
        match="empirical_fisher: per_example_loss returned complex128.*real and imaginary",
    ):
        ko.empirical_fisher(log_psi).layers(w, x)


def test_a_head_of_the_user_is_refused_too():
    class Own(ko.Normal):
        def __post_init__(self):
            pass

    jax.tree_util.register_pytree_node(
        Own, lambda head: ((head.mean,), None), lambda _, mean: Own(*mean, 1.0)
    )
    w, x = oracles.normal(0, (3, 2)), oracles.normal(1, (N, 3))
    with pytest.raises(TypeError, match="ggn: predict returned Own of complex128"):
        ko.ggn(lambda w, x: Own(log_psi(w, x)[:, None], 1.0)).layers(w, x)


def test_two_real_outputs_give_the_metric_of_the_wave_function():
    """`Re E[conj(O) O^T]` with `O` the derivative of `log psi`, in the products as in the factors."""
    w, x = oracles.normal(0, (3, 2)), oracles.normal(1, (N, 3))

    def predict(w, x):
        z = log_psi(w, x)
        return ko.Normal(jnp.stack([z.real, z.imag], -1))

    estimator = ko.ggn(predict)
    real, imaginary = (
        jax.jacrev(lambda w, part=part: part(log_psi(w, x)))(w) for part in (jnp.real, jnp.imag)
    )
    columns = np.asarray(real + 1j * imaginary).reshape(N, -1)
    metric = (columns.conj().T @ columns).real / N
    product = jax.vmap(lambda v: estimator.vector_product(w, v.reshape(3, 2), x).ravel())(
        jnp.eye(6)
    )
    np.testing.assert_allclose(product, metric, rtol=1e-10, atol=1e-12)
    layers = estimator.layers(w, x)
    (factors,), _ = estimator.at(w, x).statistics(oracles.plan(layers))
    np.testing.assert_allclose(
        np.kron(factors.inputs[0], factors.outputs[0]), metric, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("uncovered", ["pass", "diagonal"])
def test_complex_parameters_are_named_and_their_gradient_is_handed_on(uncovered):
    params, x = problem()
    estimator = ko.ggn(lambda p, x: ko.Normal(rbm(p, x)))
    layers = estimator.layers(params, x)
    assert [layer.kernel for layer in layers] == ["head"]
    assert {u.path: u.reason.partition(":")[0] for u in layers.uncovered} == dict.fromkeys(
        "wb", "complex parameter"
    )
    grads = jax.grad(lambda p: jnp.mean(rbm(p, x)[:, 0] * jnp.arange(N)))(params)
    for damping in (1e-3, 1e6):
        tx = ko.kfac(
            layers, learning_rate=0.1, damping=damping, uncovered=uncovered, bound="damped"
        )
        updates, state = tx.update(
            grads, tx.init(params), params, curvature=estimator.at(params, x)
        )
        for name in "wb":
            np.testing.assert_array_equal(updates[name], grads[name])
        assert all(not jnp.iscomplexobj(v) for v in jax.tree.leaves(state))
        assert np.isfinite(updates["head"]).all()
    with pytest.raises(
        ValueError, match=r"w \(3, 4\): complex parameter: not measured, its gradient is handed on"
    ):
        ko.kfac(layers, learning_rate=0.1, uncovered="raise")


def test_a_real_layer_on_complex_numbers_is_left_out_and_has_a_diagonal():
    """Its rows would be complex; the derivative by its parameter is real, and so is the diagonal of
    one example.
    """
    params = {"w": oracles.normal(0, (3, 2)), "head": oracles.normal(1, (2, 1))}
    z = oracles.normal(2, (1, 3)) + 1j * oracles.normal(3, (1, 3))
    predict = lambda p, z: ko.Normal(dense(jnp.abs(dense(z, p["w"])) ** 2, p["head"]))
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, z)
    assert [(u.path, u.reason) for u in layers.uncovered] == [
        ("w", "its layer computes with complex numbers: not measured")
    ]
    tx = ko.kfac(layers, learning_rate=0.1, uncovered="diagonal", bound="damped")
    _, state = tx.update(params, tx.init(params), params, curvature=estimator.at(params, z))
    want = jax.grad(lambda w: predict({**params, "w": w}, z).mean[0, 0])(params["w"]) ** 2
    np.testing.assert_allclose(
        state.preconditioner.factors["diagonal_1x6"].ravel(), want.ravel(), rtol=1e-10
    )


def test_products_of_complex_parameters_are_those_of_their_real_pairs():
    """A cotangent, as `jax.grad` gives it: `v^T F v = Re sum(v * (F v))`, of all pairs of
    directions.
    """
    params, x = problem()
    estimator = ko.ggn(lambda p, x: ko.Normal(rbm(p, x)))
    draw = lambda seed: {
        k: oracles.normal(seed, v.shape)
        + (1j * oracles.normal(seed + 1, v.shape) if jnp.iscomplexobj(v) else 0)
        for k, v in params.items()
    }
    directions = [draw(20), draw(30)]

    def along(t):
        return rbm(
            jax.tree.map(lambda p, *d: p + sum(a * b for a, b in zip(t, d)), params, *directions), x
        )[:, 0]

    columns = jax.jacrev(along)(jnp.zeros(2))
    want = columns.T @ columns / N
    np.testing.assert_allclose(estimator.at(params, x).quadratic_form(directions), want, rtol=1e-9)
    for i, v in enumerate(directions):
        product = estimator.vector_product(params, v, x)
        for j, u in enumerate(directions):
            got = sum(
                jnp.sum(a * b).real for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(product))
            )
            np.testing.assert_allclose(got, want[i, j], rtol=1e-9)


def test_input_products_leave_complex_parameters_at_zero():
    params, x = problem()
    estimator = ko.forward_only(lambda p, x: ko.Normal(rbm(p, x)))
    product = estimator.vector_product(params, jax.tree.map(jnp.ones_like, params), x)
    assert (product["w"] == 0).all() and (np.asarray(product["head"]) != 0).any()
    assert [v.dtype for v in jax.tree.leaves(product)] == [v.dtype for v in jax.tree.leaves(params)]


def test_graft_and_step_rules_take_the_size_of_a_complex_gradient_from_its_absolute_values():
    params, x = problem()
    estimator = ko.ggn(lambda p, x: ko.Normal(rbm(p, x)))
    layers = estimator.layers(params, x)
    rms = lambda v: np.sqrt(np.mean(np.abs(v) ** 2))
    run = lambda tx: tx.update(
        params, tx.init(params), params, curvature=estimator.at(params, x), refresh=True
    )
    updates, _ = run(ko.kfac(layers, learning_rate=0.1, damping=0.1, uncovered="graft"))
    for name in "wb":
        np.testing.assert_allclose(rms(updates[name]), rms(updates["head"]), rtol=1e-10)
        np.testing.assert_allclose(np.angle(updates[name]), np.angle(params[name]), rtol=1e-10)

    tx = ko.kfac(layers, kl_clip=None, damping=0.1)
    plain, _ = run(tx)
    total = sum(float(np.sum(np.real(u * np.conj(params[n])))) for n, u in plain.items())
    clipped, _ = run(ko.clip_by_trust_region(tx, learning_rate=1.0, radius=1e-3 * total / 2))
    for name in params:
        np.testing.assert_allclose(clipped[name], plain[name] * np.sqrt(1e-3), rtol=1e-10)
    bounded, _ = run(ko.clip_by_rms(tx, max_rms=0.01))
    grafted, _ = run(ko.graft_norm(tx))
    for name in params:
        np.testing.assert_allclose(rms(bounded[name]), 0.01, rtol=1e-10)
        np.testing.assert_allclose(rms(grafted[name]), rms(params[name]), rtol=1e-10)
    scaled, state = run(
        ko.clip_by_trust_region(
            tx, learning_rate=1.0, radius=1e-9, metric=ko.factor_metric(layers), layers=layers
        )
    )
    np.testing.assert_allclose(scaled["head"], plain["head"] * state.trust_scale, rtol=1e-5)
    np.testing.assert_array_equal(scaled["w"], plain["w"])
    assert 0 < state.trust_scale < 1
