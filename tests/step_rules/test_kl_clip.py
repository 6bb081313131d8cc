"""KL-clip over K-FAC and over other preconditioners."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_optax as ko

VALUES = st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3)


@settings(max_examples=30, deadline=None)
@given(VALUES, VALUES, st.floats(1e-3, 10), st.floats(1e-6, 1))
def test_bound_is_met_exactly_when_active(u, v, rate, kappa):
    u, v = ({"a": jnp.float32(x[0]), "b": jnp.asarray(x[1:], jnp.float32)} for x in (u, v))
    nu = float(ko.kl_scale(u, v, rate, kappa))
    products = [abs(float(jnp.vdot(u[k], v[k]))) for k in u]
    norm = rate**2 * sum(products)  # of each leaf on its own, so that they cannot cancel
    assert 0 < nu <= 1
    if nu < 1:
        np.testing.assert_allclose(nu**2 * norm, kappa, rtol=1e-4)
    else:
        assert norm <= kappa * (1 + 1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_scale_is_one_where_the_sum_means_nothing(bad):
    assert float(ko.kl_scale(jnp.array([bad]), jnp.array([1.0]), 0.1, 1e-3)) == 1.0


def test_works_over_any_preconditioner_and_forwards_extra_arguments():
    def update(updates, state, params=None, *, gain, **extra):
        return jax.tree.map(lambda g: gain * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    for preconditioner, extra in ((optax.scale_by_adam(), {}), (inner, {"gain": 2.0})):
        tx = ko.clip_by_kl(preconditioner, learning_rate=1.0, kl_clip=1e-2)
        params = {"w": jnp.ones((2, 2))}
        grads = {"w": jnp.full((2, 2), 3.0)}
        plain, _ = optax.with_extra_args_support(preconditioner).update(
            grads, preconditioner.init(params), params, **extra
        )
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params, **extra)
        nu = np.sqrt(1e-2 / np.sum(plain["w"] * grads["w"]))
        np.testing.assert_allclose(updates["w"], nu * plain["w"], rtol=1e-5)
        np.testing.assert_allclose(state.kl_scale, nu, rtol=1e-5)


def test_none_switches_it_off_without_changing_the_state():
    params = jnp.ones(3)
    off, on = (ko.clip_by_kl(optax.identity(), learning_rate=1.0, kl_clip=k) for k in (None, 1e-3))
    updates, state = off.update(params, off.init(params))
    np.testing.assert_array_equal(updates, params)
    assert jax.tree.structure(state) == jax.tree.structure(on.update(params, on.init(params))[1])


def test_a_rate_is_checked_where_it_is_not_read():
    for kl_clip in (None, 1e-3):
        with pytest.raises(ValueError, match="clip_by_kl: learning_rate=-1; expected"):
            ko.clip_by_kl(optax.identity(), learning_rate=-1, kl_clip=kl_clip)
    with pytest.raises(TypeError, match="clip_by_kl: learning_rate is '0.1'; expected a number"):
        ko.clip_by_kl(optax.identity(), learning_rate="0.1", kl_clip=None)


def test_dtype_of_the_updates_is_kept():
    tx = ko.clip_by_kl(optax.identity(), learning_rate=1.0, kl_clip=1e-3)
    grads = jnp.ones(3, jnp.bfloat16)
    assert tx.update(grads, tx.init(grads))[0].dtype == jnp.bfloat16


def test_many_equal_leaves_are_as_few():
    """Leaves are stacked where there are many of one type; a scalar and an empty leaf go along."""
    rng = np.random.default_rng(0)
    shapes = {**{f"w{i}": (2, 3) for i in range(9)}, "b": (), "empty": (0, 2)}
    u, v = (
        {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in shapes.items()} for _ in "uv"
    )
    product = sum(abs(np.sum(np.asarray(u[k]) * np.asarray(v[k]))) for k in shapes)
    scale = ko.kl_scale(u, v, 0.5, 1e-2)
    np.testing.assert_allclose(scale, np.sqrt(1e-2 / (0.25 * product)), rtol=1e-5)
