"""Parameters and activations in bfloat16, float16 and float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h


def _first_step(problem, preset="kfac_two_level", **settings):
    """Updates and state of one compiled step from `init`."""
    tx = h.make_tx(preset, problem, **settings)

    @jax.jit
    def step(params):
        return tx.update(
            problem.grad(params),
            tx.init(params),
            params,
            curvature=problem.at(params),
            refresh=True,
        )

    return step(problem.params)


def _dtypes(tree):
    return {
        str(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def test_half_parameters():
    """Updates have the dtype of the gradient, the state is float32, values are those of float32 up
    to rounding.
    """
    params = h.plain_params(dtype=jnp.bfloat16)
    problem = h.make_problem(h.plain_predict, params, *h.data(dtype=jnp.bfloat16))
    updates, state = _first_step(problem)
    assert _dtypes(updates) == {"bfloat16"}
    assert _dtypes(state) == {"float32"}
    wide = h.make_problem(
        h.plain_predict, jax.tree.map(lambda p: p.astype(jnp.float32), params), problem.x, problem.y
    )
    expected, expected_state = _first_step(wide)
    h.assert_close(
        optax.tree.get(state, "factors"),
        optax.tree.get(expected_state, "factors"),
        rtol=0.1,
        atol=0.01,
    )
    difference = optax.tree.norm(
        jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, updates, expected)
    )
    assert difference < 0.1 * optax.tree.norm(expected)


def test_every_leaf_keeps_its_own_dtype():
    """A float32 bias beside a bfloat16 kernel; the update takes the dtype of the gradient, not of
    the parameter.
    """
    params = h.plain_params()
    mixed = jax.tree.map_with_path(
        lambda path, p: p.astype(jnp.bfloat16) if path[-1].key == "w" else p, params
    )
    problem = h.plain_problem()
    tx = h.make_tx("kfac_two_level", problem)
    updates = jax.eval_shape(
        lambda g: tx.update(g, tx.init(g), g, curvature=problem.at(params))[0], mixed
    )
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, mixed)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    updates = jax.eval_shape(
        lambda g: tx.update(g, tx.init(params), params, curvature=problem.at(params))[0], half
    )
    assert _dtypes(updates) == {"bfloat16"}


def test_double_parameters():
    """Under `enable_x64` float64 parameters give float64 factors, right to double precision."""
    with jax.enable_x64(True):
        problem = h.make_problem(
            h.plain_predict, h.plain_params(dtype=jnp.float64), *h.data(dtype=jnp.float64)
        )
        updates, state = _first_step(problem)
        assert _dtypes(updates) == {"float64"}
        assert _dtypes(
            (
                optax.tree.get(state, "factors"),
                optax.tree.get(state, "inverses"),
                optax.tree.get(state, "coarse"),
            )
        ) == {"float64"}
        x = np.asarray(problem.x, np.float64)
        rows = np.concatenate([x, np.ones((h.N, 1))], 1)
        (factors,) = optax.tree.get(state, "factors").values()
        np.testing.assert_allclose(factors.inputs[0], rows.T @ rows / h.N, rtol=1e-13)
        vectors, values = optax.tree.get(state, "inverses")["dense_5x4_bias"].inputs
        again = (vectors[0] * values[0]) @ vectors[0].T
        np.testing.assert_allclose(again, factors.inputs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("params_dtype", "factor_dtype", "expected"),
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float32", None, "float32"),
        ("float64", None, "float64"),
        ("float64", "float32", "float32"),
        ("float32", "float64", "float64"),
    ],
)
def test_dtype_of_the_state(params_dtype, factor_dtype, expected):
    """The widest of float32 and the parameters, unless `factor_dtype` says otherwise; the same
    after an update.
    """
    with jax.enable_x64(True):
        problem = h.make_problem(
            h.plain_predict, h.plain_params(dtype=params_dtype), *h.data(dtype=params_dtype)
        )
        tx = h.make_tx("kfac_two_level", problem, factor_dtype=factor_dtype)
        params = problem.params
        init = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(
            lambda s: tx.update(params, s, params, curvature=problem.at(params)), init
        )
    for state in (init, after):
        assert _dtypes(
            [optax.tree.get(state, name) for name in ("factors", "inverses", "coarse")]
        ) == {expected}
    assert _dtypes(updates) == {params_dtype}


class _HalfModel(nn.Module):
    """Float32 parameters, bfloat16 activations: the usual mixed precision of linen."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, dtype=jnp.bfloat16)(x))
        return nn.Dense(4, dtype=jnp.bfloat16)(x).astype(jnp.float32)


def test_model_in_bfloat16_with_float32_parameters():
    """The layer is found through the cast, and its float32 factor is the second moment of what the
    module was given.
    """
    model = _HalfModel()
    x, y = h.data()
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    problem = h.make_problem(
        lambda p, x: ko.Categorical(model.apply({"params": p}, x)), params, x, y
    )
    assert [layer.kernel for layer in problem.layers] == ["Dense_0/kernel", "Dense_1/kernel"]
    assert problem.layers.uncovered == ()
    updates, state = _first_step(problem)
    assert _dtypes((updates, state)) == {"float32"}
    first, second = optax.tree.get(state, "factors")["dense_5x4_bias"].inputs
    np.testing.assert_allclose(first, _second_moment(x), rtol=1e-5, atol=1e-6)
    hidden = jnp.tanh(nn.Dense(4, dtype=jnp.bfloat16).apply({"params": params["Dense_0"]}, x))
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(second, _second_moment(hidden), rtol=1e-2, atol=1e-3)


def _second_moment(x):
    rows = np.concatenate([np.asarray(x, np.float64), np.ones((h.N, 1))], 1)
    return rows.T @ rows / h.N


def test_parameters_cast_by_the_user():
    """A cast before `apply` is followed by data flow to the float32 parameters; updates are close
    to those without.
    """
    plain = h.plain_problem()

    def predict(params, x):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return ko.Categorical(
            h.plain_predict(half, x.astype(jnp.bfloat16)).logits.astype(jnp.float32)
        )

    problem = h.make_problem(predict, plain.params, plain.x, plain.y)
    assert [(x.kernel, x.bias) for x in problem.layers] == [
        (x.kernel, x.bias) for x in plain.layers
    ]
    assert problem.layers.uncovered == ()
    updates, state = _first_step(problem)
    expected, expected_state = _first_step(plain)
    assert _dtypes((updates, state)) == {"float32"}
    h.assert_close(
        optax.tree.get(state, "factors"),
        optax.tree.get(expected_state, "factors"),
        rtol=0.1,
        atol=0.01,
    )
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, updates, expected))
    assert 0 < difference < 0.1 * optax.tree.norm(expected)


def test_injected_damping_keeps_float32_under_bfloat16_parameters():
    """Optax casts injected Python floats to the parameters' dtype; an explicit float32 stays exact,
    also in our state.
    """
    params = h.plain_params(dtype=jnp.bfloat16)
    problem = h.plain_problem()
    for damping, expected in (
        (1e-3, float(jnp.bfloat16(1e-3))),
        (jnp.float32(1e-3), float(jnp.float32(1e-3))),
    ):
        tx = optax.inject_hyperparams(ko.kfac)(problem.layers, learning_rate=0.1, damping=damping)
        update = jax.jit(
            lambda p, tx=tx: tx.update(p, tx.init(p), p, curvature=None, refresh=False)[1]
        )
        state = update(params)
        assert float(optax.tree.get(state.inner_state, "damping")) == expected
        h.assert_same_types(
            jax.eval_shape(tx.init, params).inner_state, jax.eval_shape(update, params).inner_state
        )
