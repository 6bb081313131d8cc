"""The trust region of ACKTR in every metric, against dense matrices and measured divergences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests import oracles

RATE, RADIUS, DAMPING = 0.5, 1e-3, 0.1
METRICS = ("damped", "exact", "factors")


def linear_softmax(weights, x):
    return ko.Categorical(ko.tap_dense(x @ weights, x, weights))


@functools.cache
def problem():
    """Two layers in double precision: estimator, parameters, inputs, gradient, layers."""
    params, x = oracles.make_params(0, (3, 4, 2)), oracles.normal(1, (6, 3))
    labels = jnp.asarray([0, 1, 1, 0, 1, 0])
    loss = lambda p: oracles.classifier(p, x).mean_nll(labels)
    grads = jax.jit(jax.grad(loss))(params)
    estimator = ko.ggn(oracles.classifier)
    return estimator, params, x, grads, estimator.layers(params, x)


def dense_metric(name, params, x):
    """`F`, or the approximation with or without damping, as a matrix in the order of
    `oracles.flatten`.
    """
    columns = jnp.asarray(oracles.softmax_columns(oracles.forward(params, x)[0]))
    a, g = oracles.per_example(params, x, columns)
    if name == "exact":
        return oracles.exact_fisher(a, g)
    blocks = oracles.block_diagonal(oracles.kronecker_fisher(a, g), oracles.block_sizes(a, g))
    return blocks + (DAMPING * np.eye(len(blocks)) if name == "damped" else 0)


@pytest.mark.parametrize("name", METRICS)
def test_predicted_divergence_is_the_radius_where_the_bound_is_active(x64, name):
    estimator, params, x, grads, layers = problem()
    fresh = ko.scale_by_curvature(layers, block=ko.kronecker(), damping=DAMPING)
    metric = ko.factor_metric(layers) if name == "factors" else name
    tx = ko.clip_by_trust_region(
        fresh, learning_rate=RATE, radius=RADIUS, metric=metric, layers=layers
    )

    @jax.jit
    def step(factor):
        scaled = jax.tree.map(lambda g: factor * g, grads)
        updates, _ = tx.update(
            scaled, tx.init(params), params, curvature=estimator.at(params, x), refresh=True
        )
        return jax.tree.map(lambda u: RATE * u, updates)

    matrix = dense_metric(name, params, x)
    active = oracles.flatten(step(100.0))
    np.testing.assert_allclose(0.5 * active @ matrix @ active, RADIUS, rtol=1e-10)
    # the size of the gradient has no part
    np.testing.assert_allclose(oracles.flatten(step(1e4)), active, rtol=1e-10)
    inside = oracles.flatten(step(1e-3))
    assert 0.5 * inside @ matrix @ inside < RADIUS
    natural = np.linalg.solve(dense_metric("damped", params, x), oracles.flatten(grads))
    np.testing.assert_allclose(inside, 1e-3 * RATE * natural, rtol=1e-10)


def test_measured_divergence_of_a_linear_policy_is_the_radius(x64):
    """`KL(old || new) / radius` tends to one, with an error that falls like the root of the radius."""
    weights, x = oracles.normal(0, (3, 4)), oracles.normal(1, (20, 3))
    fisher = ko.ggn(linear_softmax)

    @jax.jit
    def ratio(radius):
        grads = jax.grad(lambda w: linear_softmax(w, x).mean_nll(jnp.arange(20) % 4))(weights)
        tx = ko.clip_by_trust_region(
            optax.scale(3.0), learning_rate=1e3, radius=radius, metric="exact"
        )
        updates, _ = tx.update(grads, tx.init(weights), weights, curvature=fisher.at(weights, x))
        p, q = (jax.nn.log_softmax(x @ w) for w in (weights, weights - 1e3 * updates))
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)) / radius

    errors = [abs(float(ratio(radius)) - 1) for radius in (1e-2, 1e-4, 1e-6)]
    assert errors[1] < 0.01
    np.testing.assert_allclose(errors[2] / errors[1], 0.1, rtol=0.1)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("covered", [False, True])
def test_half_the_kl_clip_is_the_same_rule(x64, covered):
    _, params, _, grads, layers = problem()
    settings = {"learning_rate": 10.0, "layers": ko.Layers(layers.layers[:1]) if covered else None}
    tx = optax.scale_by_sign()
    clips = [
        ko.clip_by_trust_region(tx, radius=5e-4, **settings),
        ko.clip_by_kl(tx, kl_clip=1e-3, **settings),
    ]
    (ours, state), (kl, kl_state) = (
        clip.update(grads, clip.init(params), params) for clip in clips
    )
    assert float(state.trust_scale) < 1
    np.testing.assert_allclose(state.trust_scale, kl_state.kl_scale, rtol=1e-7)
    np.testing.assert_allclose(oracles.flatten(ours), oracles.flatten(kl), rtol=1e-12)


def test_signs_of_inner_products_count():
    """The sum over leaves is that of the whole matrix; KL-clip adds up absolute values."""
    flip = optax.stateless(lambda u, _: {"a": u["a"], "b": -u["b"]})
    grads = {"a": jnp.full(1, 3.0), "b": jnp.full(1, 2.0)}
    tx = ko.clip_by_trust_region(flip, learning_rate=1.0, radius=0.5)
    np.testing.assert_allclose(
        tx.update(grads, tx.init(grads))[1].trust_scale, 1 / np.sqrt(5), rtol=1e-6
    )


@pytest.mark.parametrize("product", [np.nan, np.inf, 0.0, -1.0])
def test_scale_is_one_where_the_product_means_nothing(product):
    assert float(ko.trust_scale(product, 0.1, 1e-3)) == 1.0
    tx = ko.clip_by_trust_region(
        optax.identity(), learning_rate=1.0, metric=lambda state, updates: product
    )
    np.testing.assert_array_equal(tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0], 1)


def test_scale_times_rate_is_the_smaller_of_both_lengths():
    for product in (1e-6, 0.3, 7.0):
        wanted = min(0.2, np.sqrt(2 * 1e-2 / product))
        np.testing.assert_allclose(0.2 * ko.trust_scale(product, 0.2, 1e-2), wanted, rtol=1e-6)


@pytest.mark.parametrize("extra", [{}, {"curvature": None}])
def test_exact_metric_without_curvature_is_an_error(extra):
    tx = ko.clip_by_trust_region(optax.identity(), learning_rate=1.0, metric="exact")
    with pytest.raises(
        ValueError, match=r"no `curvature`, which metric=\"exact\" needs in every step"
    ):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), **extra)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0.0}, "clip_by_trust_region: radius=0.0; expected radius > 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0; expected learning_rate >= 0"),
        ({"metric": "euclidean"}, "metric='euclidean'; expected one of 'damped', 'exact'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ko.clip_by_trust_region(optax.identity(), **{"learning_rate": 1.0} | settings)


@pytest.mark.parametrize("name", METRICS)
def test_schedules_and_injected_numbers_in_a_chain_under_scan(name):
    problem = h.plain_problem()
    metric = ko.factor_metric(problem.layers) if name == "factors" else name
    inner = h.make_tx("kfac", problem, kl_clip=None) if name == "factors" else optax.scale(3.0)
    radius, rate = optax.linear_schedule(1e-2, 1e-4, 5), optax.linear_schedule(20.0, 10.0, 5)
    settings = {"learning_rate": rate, "radius": radius, "metric": metric, "layers": problem.layers}
    tx = ko.clip_by_trust_region(inner, **settings)
    _, (state, _), updates = h.run(optax.chain(tx, optax.scale(2.0)), problem, 6)
    assert int(state.trust_count) == 6
    assert 0 < float(state.trust_scale) < 1  # the scan itself checks that the state keeps its types
    if name == "factors":
        return
    static = ("layers", "metric", "preconditioner", "subsample", "axis_name")
    injected = optax.inject_hyperparams(ko.clip_by_trust_region, static_args=static)(
        inner, **settings
    )
    _, (same_state, _), same = h.run(optax.chain(injected, optax.scale(2.0)), problem, 6)
    h.assert_close(updates, same)
    h.assert_close(state, same_state.inner_state)


@pytest.mark.parametrize("name", METRICS)
def test_masked_is_the_smaller_problem(x64, name):
    """What is masked is no part of the direction; it passes unchanged."""
    estimator, params, x, grads, layers = problem()
    mask = {"layer0": False, "layer1": True}
    metric = ko.factor_metric(layers) if name == "factors" else name
    natural = ko.scale_by_curvature(layers, block=ko.kronecker(), damping=DAMPING)
    tx = optax.masked(ko.clip_by_trust_region(natural, learning_rate=10.0, metric=metric), mask)
    extra = {"curvature": estimator.at(params, x), "refresh": True}
    updates, _ = jax.jit(lambda g: tx.update(g, tx.init(params), params, **extra))(grads)
    np.testing.assert_array_equal(updates["layer0"]["kernel"], grads["layer0"]["kernel"])
    step = updates | {"layer0": jax.tree.map(jnp.zeros_like, updates["layer0"])}
    step = 10.0 * oracles.flatten(step)
    np.testing.assert_allclose(0.5 * step @ dense_metric(name, params, x) @ step, 1e-3, rtol=1e-10)


def test_exact_metric_measures_what_is_scaled(x64):
    """Leaves without a layer keep their gradient, and the bound holds for the covered part."""
    estimator, params, x, grads, layers = problem()
    only_first = ko.Layers(layers.layers[:1])
    tx = ko.clip_by_trust_region(
        optax.identity(), learning_rate=100.0, metric="exact", layers=only_first
    )
    updates, _ = tx.update(grads, tx.init(params), params, curvature=estimator.at(params, x))
    np.testing.assert_array_equal(updates["layer1"]["kernel"], grads["layer1"]["kernel"])
    step = 100.0 * oracles.flatten(
        updates | {"layer1": jax.tree.map(jnp.zeros_like, updates["layer1"])}
    )
    np.testing.assert_allclose(
        0.5 * step @ dense_metric("exact", params, x) @ step, 1e-3, rtol=1e-10
    )


def test_part_of_the_batch_serves_the_exact_metric(x64):
    estimator, params, x, grads, _ = problem()
    scales = []
    for subsample, batch in ((0.5, x), (None, x[::2])):
        tx = ko.clip_by_trust_region(
            optax.identity(), learning_rate=9.0, metric="exact", subsample=subsample
        )
        scales.append(
            tx.update(grads, tx.init(params), params, curvature=estimator.at(params, batch))[
                1
            ].trust_scale
        )
    assert scales[0] == scales[1] < 1


def test_a_batch_split_over_devices_gives_one_scale(x64):
    """`axis_name`, here of a `vmap`: the product is that of the whole batch."""
    estimator, params, x, grads, _ = problem()

    def scale(x, axis_name=None):
        tx = ko.clip_by_trust_region(
            optax.identity(), learning_rate=9.0, metric="exact", axis_name=axis_name
        )
        return tx.update(grads, tx.init(params), params, curvature=estimator.at(params, x))[
            1
        ].trust_scale

    split = jax.jit(jax.vmap(lambda x: scale(x, "devices"), axis_name="devices"))(
        x.reshape(2, 3, 3)
    )
    np.testing.assert_allclose(split, jax.jit(scale)(x), rtol=1e-6)
    assert float(split[0]) < 1


def test_curvature_that_shares_the_forward_pass_of_the_loss(x64):
    estimator, params, x, grads, _ = problem()
    tx = ko.clip_by_trust_region(optax.identity(), learning_rate=9.0, metric="exact")

    @jax.jit
    def both(params):
        y = jnp.asarray([0, 1, 1, 0, 1, 0])
        _, same, shared = estimator.value_and_grad(lambda p, y: p.mean_nll(y))(params, x, targets=y)
        once = lambda g, curvature: tx.update(g, tx.init(params), params, curvature=curvature)[0]
        return once(same, shared), once(grads, estimator.at(params, x))

    one, two = map(oracles.flatten, both(params))
    np.testing.assert_allclose(one, two, rtol=1e-12)


def test_dtype_of_the_updates_is_kept_and_diagnostics_show_the_scale():
    tx = ko.clip_by_trust_region(optax.identity(), learning_rate=1.0)
    grads = jnp.ones(3, jnp.bfloat16)
    updates, state = tx.update(grads, tx.init(grads))
    assert updates.dtype == jnp.bfloat16
    problem = h.plain_problem()
    tx = ko.clip_by_trust_region(h.make_tx("kfac", problem, kl_clip=None), learning_rate=1.0)
    state = jax.jit(tx.init)(problem.params)
    assert float(ko.diagnostics(state)["trust_scale"]) == 1.0
