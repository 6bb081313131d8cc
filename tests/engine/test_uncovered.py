"""`uncovered="graft"`: gradients of parameters without a block get the size of the preconditioned
updates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.engine.state import CurvatureState, the_state
from tests import helpers as h

COVERED, LEFT, IDLE = ("w", "b", "head"), ("gain", "temperature"), ("idle",)


def predict(p, x):
    hidden = h.dense(x, p["w"], p["b"]) * h.computed(p["gain"]) * jnp.exp(p["temperature"])
    return ko.Normal(h.dense(jnp.tanh(hidden), p["head"]))


def parameters(dtype=jnp.float32):
    shapes = {"w": (3, 4), "b": (4,), "head": (4, 2), "gain": (4,), "temperature": (), "idle": (2,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        n: jax.random.normal(k, s).astype(dtype)
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


X = jax.random.normal(jax.random.key(1), (6, 3))
ESTIMATOR = ko.ggn(predict)
LAYERS = ESTIMATOR.layers(parameters(), X)
COUPLINGS = {"none": None, "coarse": ko.coarse_correction()}


@functools.cache
def stepper(coupling="none", **settings):
    settings = {"coupling": COUPLINGS[coupling], "damping": 0.1} | settings
    tx = ko.scale_by_curvature(LAYERS, block=ko.kronecker(), **settings)

    @jax.jit
    def step(grads):
        params = parameters()
        # any gradient will do
        return tx.update(
            grads, tx.init(params), params, curvature=ESTIMATOR.at(params, X), refresh=True
        )

    return step


def once(tx, grads, params, estimator=ESTIMATOR):
    """One compiled step."""
    step = lambda g, p: tx.update(g, tx.init(p), p, curvature=estimator.at(p, X), refresh=True)
    return jax.jit(step)(grads, params)


def rms(*leaves):
    entries = np.concatenate([np.ravel(x).astype(np.float64) for x in leaves])
    return np.sqrt(np.mean(np.square(entries)))


def of(tree, names):
    return [tree[n] for n in names]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_entries_are_as_large_as_those_of_the_preconditioned_updates(coupling):
    grads = parameters()
    updates, _ = stepper(coupling, uncovered="graft")(grads)
    plain, _ = stepper(coupling)(grads)
    for name in COVERED + IDLE:
        np.testing.assert_array_equal(updates[name], plain[name])
    wanted = rms(*of(updates, COVERED))
    for name in LEFT:
        np.testing.assert_allclose(rms(updates[name]), wanted, rtol=1e-5)
        # the direction is that of the gradient
        np.testing.assert_allclose(
            updates[name] * rms(grads[name]), grads[name] * wanted, rtol=1e-5
        )
    np.testing.assert_array_equal(updates["idle"], grads["idle"])


@pytest.mark.parametrize("scale", [1e-18, 1e3, 1e25])
def test_the_size_of_the_gradient_does_not_matter(scale):
    grads = parameters()
    step = stepper(uncovered="graft")
    expected, _ = step(grads)
    got, state = step(grads | {n: scale * grads[n] for n in LEFT})
    h.assert_close({n: got[n] for n in COVERED + LEFT}, {n: expected[n] for n in COVERED + LEFT})
    assert not ko.problems(state)


def test_the_parts_one_by_one():
    """The gradient is in the first part, with the size of that."""
    grads = parameters()
    parts = stepper("coarse", uncovered="graft", separate=True)(grads)[0].parts
    assert len(parts) == 2 and rms(*of(parts[1], COVERED)) > 0
    for name in LEFT:
        np.testing.assert_allclose(rms(parts[0][name]), rms(*of(parts[0], COVERED)), rtol=1e-5)
        assert not parts[1][name].any()
    np.testing.assert_array_equal(parts[0]["idle"], grads["idle"])


def test_what_vanishes_stays_zero():
    grads, step = parameters(), stepper(uncovered="graft")
    updates, state = step(grads | {"gain": jnp.zeros(4)})
    assert not updates["gain"].any() and updates["temperature"] != 0 and not ko.problems(state)
    updates, state = step(grads | {n: jnp.zeros_like(grads[n]) for n in COVERED})
    assert not any(updates[n].any() for n in COVERED + LEFT) and not ko.problems(state)


def test_a_gradient_that_is_no_number_leaves_the_step_out():
    spoilt = parameters() | {"temperature": jnp.float32(jnp.nan)}
    updates, state = stepper(uncovered="graft")(spoilt)
    assert not any(u.any() for u in updates.values())
    assert int(the_state(state, CurvatureState, "test").non_finite_updates) == 1


def test_nothing_left_nothing_done():
    problem = h.plain_problem()
    programs = []
    for settings in ({"uncovered": "graft"}, {}):
        tx = h.make_tx("kfac", problem, **settings)
        step = lambda g, p, tx=tx: tx.update(
            g, tx.init(p), p, curvature=problem.at(p), refresh=True
        )
        programs.append(jax.jit(step).lower(h.plain_grads(), problem.params).as_text())
    assert programs[0] == programs[1]


def test_the_clip_shrinks_both_alike():
    """One rate fits all parameters also where KL-clip or a trust region makes the step shorter."""
    grads, params = parameters(), parameters()
    tx = ko.kfac(
        LAYERS, learning_rate=1.0, kl_clip=1e-6, damping=0.1, uncovered="graft", bound="damped"
    )
    free = ko.kfac(LAYERS, kl_clip=None, damping=0.1, uncovered="graft")
    table = ko.coverage(LAYERS, uncovered="graft")
    rule = ko.clip_by_trust_region(free, learning_rate=1.0, radius=1e-6, layers=table)
    for clipped in (tx, rule):
        updates, state = once(clipped, grads, params)
        scale = state.kl_scale if hasattr(state, "kl_scale") else state.trust_scale
        assert 0 < scale < 0.1
        for name in LEFT:
            np.testing.assert_allclose(rms(updates[name]), rms(*of(updates, COVERED)), rtol=1e-5)
        np.testing.assert_array_equal(updates["idle"], grads["idle"])


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_a_transformation_that_sees_a_part(wrapper):
    """The size is that of the blocks it sees."""
    grads = params = parameters()
    mine = {n: n not in ("head", "temperature") for n in params}
    tx = ko.scale_by_curvature(LAYERS, block=ko.kronecker(), damping=0.1, uncovered="graft")
    if wrapper == "masked":
        tx = optax.masked(tx, mine)
    else:
        labels = {n: "kfac" if mine[n] else "other" for n in params}
        tx = optax.partition({"kfac": tx, "other": optax.identity()}, labels)
    updates, _ = once(tx, grads, params)
    np.testing.assert_allclose(rms(updates["gain"]), rms(updates["w"], updates["b"]), rtol=1e-5)
    for name in ("head", "temperature", "idle"):
        np.testing.assert_array_equal(updates[name], grads[name])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters(dtype):
    """The squares of the entries are no numbers of the dtype."""
    params = parameters(dtype)
    grads = params | {
        n: (2e4 * params[n] / jnp.abs(params[n]).max()).astype(dtype) for n in params if n != "idle"
    }
    tx = ko.scale_by_curvature(LAYERS, block=ko.kronecker(), damping=1.0, uncovered="graft")
    updates, state = once(tx, grads, params)
    assert not ko.problems(state)
    h.assert_same_types(updates, params)
    for name in LEFT:
        np.testing.assert_allclose(rms(updates[name]), rms(*of(updates, COVERED)), rtol=1e-2)
    assert rms(*of(updates, COVERED)) > 500  # squares beyond float16


def test_one_large_entry_of_a_narrow_leaf_stays_in_range():
    tx = ko.scale_by_curvature(LAYERS, block=ko.kronecker(), damping=1e-3, uncovered="graft")
    params = parameters() | {"gain": jnp.ones(4, jnp.float16)}
    grads = {n: 1e6 * x if n in COVERED else x for n, x in parameters().items()}
    grads["gain"] = jnp.array([1, 0, 0, 0], jnp.float16)
    updates, state = once(tx, grads, params)
    assert rms(*of(updates, COVERED)) > 65504
    assert float(updates["gain"][0]) == 65504 and not ko.problems(state)


def test_normalisation_layers_that_are_passed_on_get_the_size_too():
    def model(p, x):
        s = h.dense(x, p["w"])
        return ko.Normal(ko.tap_scale_shift(s * p["scale"] + p["shift"], s, p["scale"], p["shift"]))

    keys = jax.random.split(jax.random.key(2), 3)
    shapes = {"w": (3, 2), "scale": (2,), "shift": (2,)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    estimator = ko.ggn(model)
    settings = {"uncovered": "graft", "normalization": "pass"}
    tx = ko.kfac(estimator.layers(params, X), kl_clip=None, damping=0.1, **settings)
    updates, _ = once(tx, params, params, estimator)
    for name in ("scale", "shift"):
        np.testing.assert_allclose(rms(updates[name]), rms(updates["w"]), rtol=1e-5)


def test_the_table_and_the_errors_say_so():
    lines = str(ko.coverage(LAYERS, uncovered="graft")).splitlines()
    row = {line.split()[0]: line for line in lines if line}
    for name in LEFT:
        assert "gradient with the size of the preconditioned updates" in row[name]
    assert "no gradient" in row["idle"]
    assert str(ko.coverage(LAYERS)).splitlines() == lines  # the presets' default
    assert "gradient passed on" in str(ko.coverage(LAYERS, uncovered="pass"))
    with pytest.raises(ValueError, match="'graft' to give it the size"):
        ko.kfac(LAYERS, kl_clip=None, uncovered="raise")
    with pytest.raises(
        ValueError,
        match="uncovered='grafted'; expected one of 'pass', 'diagonal', 'graft', 'raise'",
    ):
        ko.kfac(LAYERS, kl_clip=None, uncovered="grafted")
