"""The step of the quadratic model against theory and dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_optax as ko
from tests import oracles

SEEDS = st.integers(0, 2**31 - 1)


def random_model(seed, rank=2):
    """A positive semi-definite form and a slope inside its range."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2, rank))
    form = root @ root.T
    return jnp.asarray(form), jnp.asarray(form @ rng.normal(size=2))


@functools.cache
def problem():
    """A net with tanh, its exact curvature as a dense matrix, and its loss."""
    params = oracles.make_params(0, (3, 4, 2))
    x, y = oracles.normal(1, (8, 3)), jnp.arange(8) % 2
    return params, x, ko.ggn(oracles.classifier), lambda p: oracles.classifier(p, x).mean_nll(y)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_partial_derivatives_vanish_at_the_solution(seed):
    with jax.enable_x64(True):
        form, slope = random_model(seed)
        solution = ko.solve_model(form, slope)
        weights = np.array([solution.rate, solution.momentum])
        conditioning = np.linalg.cond(form)
        np.testing.assert_allclose(
            form @ weights, -slope, atol=1e-14 * conditioning * np.abs(slope).max() + 1e-300
        )


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(-2, 2))
def test_a_fixed_weight_stays_and_the_other_is_optimal(seed, fixed):
    with jax.enable_x64(True):
        form, slope = random_model(seed)
        momentum_free = ko.solve_model(form, slope, learning_rate=fixed)
        rate_free = ko.solve_model(form, slope, momentum=fixed)
        assert float(momentum_free.rate) == float(rate_free.momentum) == fixed
        for free, solution in ((1, momentum_free), (0, rate_free)):
            weights = np.array([solution.rate, solution.momentum])
            residual = (form @ weights + slope)[free]
            assert abs(residual) <= 1e-12 * (np.abs(form) @ np.abs(weights) + np.abs(slope))[free]
        both = ko.solve_model(form, slope, learning_rate=0.1, momentum=0.9)
        assert (float(both.rate), float(both.momentum)) == (0.1, 0.9)


def test_without_a_previous_step_only_the_rate_is_solved_for(x64):
    solution = ko.solve_model(jnp.array([[4.0, 0.0], [0.0, 0.0]]), jnp.array([-2.0, 0.0]))
    assert (float(solution.rate), float(solution.momentum)) == (0.5, 0.0)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_parallel_directions_use_the_first_alone(seed):
    with jax.enable_x64(True):
        form, slope = random_model(seed, rank=1)
        solution = ko.solve_model(form, slope)
        assert float(solution.momentum) == 0
        np.testing.assert_allclose(solution.rate, -slope[0] / form[0, 0], rtol=1e-12)
        # the minimum along the line is the minimum of the singular model
        lowest = -0.5 * slope @ np.linalg.pinv(form, rcond=1e-10) @ slope
        np.testing.assert_allclose(0.5 * slope[0] * solution.rate, lowest, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "finite", "convex"),
    [
        ([[np.nan, 0], [0, 1]], False, False),
        ([[1, 0], [0, np.inf]], False, True),
        ([[-1, 0], [0, 1]], True, False),
        ([[0, 0], [0, 1]], True, False),  # falls for ever
    ],
)
def test_no_step_where_the_model_has_no_minimum(form, finite, convex):
    solution = ko.solve_model(jnp.asarray(form, jnp.float32), jnp.array([-1.0, 0.0]))
    assert (float(solution.rate), float(solution.momentum)) == (0, 0)
    assert (bool(solution.finite), bool(solution.convex)) == (finite, convex)


def test_a_vanished_gradient_is_no_failure():
    solution = ko.solve_model(jnp.zeros((2, 2)), jnp.zeros(2))
    assert bool(solution.convex) and float(solution.rate) == 0


def test_the_form_equals_the_dense_matrix_on_the_whole_batch_and_a_part(x64):
    params, x, estimator, _ = problem()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    directions = [oracles.normal(k, flat.shape) for k in (2, 3, 4)]

    @jax.jit
    def rows(x):
        logits = lambda v: oracles.forward(unravel(v), x, tapped=False)[0]
        y = jax.nn.softmax(logits(flat))
        hessians = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(y)
        jacobian = jax.jacobian(logits)(flat)
        return jnp.einsum("nci,ncd,ndj->ij", jacobian, hessians, jacobian) / len(x)

    curvature = estimator.at(params, x)
    form = jax.jit(
        lambda d, s=None: curvature.quadratic_form(list(map(unravel, d)), subsample=s),
        static_argnums=1,
    )
    d = np.stack(directions)
    np.testing.assert_allclose(form(directions, None), d @ rows(x) @ d.T, rtol=1e-11)
    np.testing.assert_allclose(form(directions, 0.5), d @ rows(x[::2]) @ d.T, rtol=1e-11)
    vector = jax.jit(curvature.vector_product)(unravel(directions[0]))
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(vector)[0], rows(x) @ d[0], rtol=1e-10, atol=1e-14
    )


def test_forward_only_is_no_model_of_the_loss(x64):
    params, x, estimator, _ = problem()
    curvature = ko.forward_only(estimator.spec.function).at(params, x)
    with pytest.raises(
        ValueError, match=r"forward_only: .*no model of the loss.*Use fisher or ggn"
    ):
        curvature.quadratic_form((params,))


def run(tx, steps, *, grad=True):
    params, x, estimator, loss = problem()

    @jax.jit
    def step(params, state):
        value, g = jax.value_and_grad(loss)(params)
        extra = {"grad": g} if grad else {"value_fn": loss}
        updates, state = tx.update(
            g, state, params, curvature=estimator.at(params, x), value=value, **extra
        )
        return optax.apply_updates(params, updates), state, updates

    state = tx.init(params)
    for _ in range(steps):
        params, state, updates = step(params, state)
    return params, state, updates


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_no_step_in_the_plane_of_both_directions_is_better(x64, weight_decay):
    """Over Adam as over K-FAC: the model is minimal over everything the step can reach."""
    params, x, estimator, loss = problem()
    for preconditioner in (
        optax.scale_by_adam(),
        ko.kfac(estimator.layers(params, x), kl_clip=None),
    ):
        tx = optax.chain(preconditioner, ko.quadratic_step(damping=0.1, weight_decay=weight_decay))

        @jax.jit
        def measured(before, state):
            gradient, curvature = jax.grad(loss)(before), estimator.at(before, x)
            value = functools.partial(model_value, curvature, gradient, shift=0.1 + weight_decay)
            kwargs = {"curvature": curvature}
            pre, _ = optax.with_extra_args_support(preconditioner).update(
                gradient, state[0], before, **kwargs
            )
            step, new = tx.update(gradient, state, before, grad=gradient, **kwargs)
            along = lambda direction: (
                lambda t: value(step=jax.tree.map(lambda a, b: a + t * b, step, direction))
            )
            slopes = [
                jax.grad(along(direction))(0.0) for direction in (pre, state[1].previous_update)
            ]
            return new[1].damped_change, value(step=step), slopes

        before, state, _ = run(tx, 3)
        damped_change, change, slopes = measured(before, state)
        np.testing.assert_allclose(damped_change, change, rtol=1e-10)
        for slope in slopes:
            assert abs(slope) < 1e-10 * abs(change)


def model_value(curvature, gradient, step, shift):
    product = jax.tree.map(lambda f, s: f + shift * s, curvature.vector_product(step), step)
    vdot = lambda a, b: sum(
        jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    return vdot(gradient, step) + vdot(step, product) / 2


def test_slopes_from_the_value_function_equal_those_from_the_gradient(x64):
    tx = optax.chain(optax.scale_by_rms(), ko.quadratic_step())
    with_grad, _, _ = run(tx, 3)
    with_value_fn, _, _ = run(tx, 3, grad=False)
    for a, b in zip(jax.tree.leaves(with_grad), jax.tree.leaves(with_value_fn), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_fixed_rate_and_momentum_are_heavy_ball(x64):
    params, _, _, loss = problem()
    tx = ko.quadratic_step(learning_rate=lambda count: 0.1 / (1 + count), momentum=0.5)
    after, state, _ = run(tx, 2)
    first = jax.tree.map(lambda g: -0.1 * g, jax.grad(loss)(params))
    middle = optax.apply_updates(params, first)
    second = jax.tree.map(lambda g, s: -0.05 * g + 0.5 * s, jax.grad(loss)(middle), first)
    for a, b in zip(
        jax.tree.leaves(after), jax.tree.leaves(optax.apply_updates(middle, second)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert float(state.step_momentum) == 0.5


def test_a_failed_model_leaves_the_step_out_and_the_momentum_as_it_was(x64):
    params, x, estimator, _ = problem()
    tx = ko.quadratic_step()
    _, state, _ = run(tx, 2)
    gradient = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    step, new = jax.jit(
        lambda g, s: tx.update(g, s, params, curvature=estimator.at(params, x), grad=g)
    )(gradient, state)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(step))
    assert int(new.non_finite_models) == 1 and int(new.negative_curvatures) == 0
    for a, b in zip(
        jax.tree.leaves(new.previous_update), jax.tree.leaves(state.previous_update), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_missing_arguments_are_named(x64):
    params, x, estimator, _ = problem()
    tx = ko.quadratic_step()
    state, at = tx.init(params), estimator.at(params, x)
    with pytest.raises(
        ValueError, match=r"quadratic_step.update: got neither grad nor value_fn.*value_fn=lambda"
    ):
        tx.update(params, state, params, curvature=at)
    for missing in ({}, {"curvature": None}):
        with pytest.raises(ValueError, match=r"needs it in every step.*measure=False"):
            tx.update(params, state, params, grad=params, **missing)
    with pytest.raises(ValueError, match="damping=-1"):
        ko.quadratic_step(damping=-1)
    with pytest.raises(ValueError, match=r"quadratic_step.update: damping=-2; expected"):
        tx.update(params, state, params, curvature=at, grad=params, damping=-2)
    with pytest.raises(ValueError, match=r"got kl_clip without learning_rate.*kl_clip=None"):
        ko.kfac(estimator.layers(params, x))


@pytest.mark.parametrize(
    ("name", "bad", "expected"),
    [
        ("momentum", 1.5, "momentum=1.5; expected momentum <= 1"),
        ("momentum", -0.1, "momentum=-0.1; expected momentum >= 0"),
        ("learning_rate", -1.0, "learning_rate=-1.0; expected learning_rate >= 0"),
        ("damping", -1e-3, "damping=-0.001; expected damping >= 0"),
        ("weight_decay", -1e-3, "weight_decay=-0.001; expected weight_decay >= 0"),
    ],
)
def test_a_number_out_of_range_raises_or_leaves_the_step_out(name, bad, expected):
    """A plain one raises; one that is known only in an update counts as a model that failed."""
    with pytest.raises(ValueError, match=f"quadratic_step: {expected}"):
        ko.quadratic_step(**{name: bad})
    estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    w, x = jnp.ones((2, 1)), jnp.eye(2)
    # the first step is good, the second is not
    tx = ko.quadratic_step(**{name: lambda count: jnp.where(count == 0, 0.5, bad)})
    update = jax.jit(lambda s: tx.update(w, s, w, curvature=estimator.at(w, x), grad=-w))
    first, state = update(tx.init(w))
    assert np.all(np.isfinite(first)) and np.any(first) and int(state.non_finite_models) == 0
    second, after = update(state)
    np.testing.assert_array_equal(second, 0)
    np.testing.assert_array_equal(after.previous_update, first)
    assert int(after.non_finite_models) == 1
