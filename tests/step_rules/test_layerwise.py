"""Rules for each layer: clipped root mean squares, grafted norms; and the cold start."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_optax as ko
from benchmarks.timing import equations
from kfac_optax._tree import gather, make_buckets, named_leaves
from tests import helpers as h

VALUES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)


def need_gain(updates, state, params=None, *, gain, **extra):
    return jax.tree.map(lambda g: gain * g, updates), state


NEEDS_GAIN = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), need_gain)
RULES = {
    "rms": lambda inner: ko.clip_by_rms(inner, max_rms=0.1),
    "graft": lambda inner: ko.graft_norm(optax.chain(inner, optax.scale_by_sign()), norm_of=inner),
    "cold_start": lambda inner: ko.cold_start(inner, steps=0),
    "decay": lambda inner: ko.add_weight_decay(inner, 0.1),
}


@functools.cache
def stack():
    """Two layers in a stack, one on its own, and a leaf without a layer: gradients and layers."""

    def predict(p, x):
        def layer(x, w):
            return jnp.tanh(ko.tap_dense(x @ w["w"] + w["b"], x, w["w"], w["b"])), None

        x, _ = jax.lax.scan(layer, x, p["stack"])
        return ko.Normal(ko.tap_dense(x @ p["last"], x, p["last"]) + h.computed(p["free"]))

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {
        "stack": {"w": draw(2, 3, 3), "b": 10 * draw(2, 3)},
        "last": draw(3, 2),
        "free": draw(2),
    }
    layers = ko.ggn(predict).layers(params, draw(4, 3))
    assert [x.copies for x in layers] == [2, 1]
    return params, layers


def matrices(tree, layers):
    """`[p, q]` of every copy of every layer, and what no layer owns."""
    leaves = named_leaves(tree)
    own = [x for b in make_buckets(layers) for x in np.asarray(gather(b, leaves, jnp.float32))]
    return [*own, np.asarray(leaves["free"])]


@settings(max_examples=30, deadline=None)
@given(VALUES, st.floats(1e-3, 10))
def test_rms_is_bounded_and_directions_stay(u, bound):
    tree = {"a": jnp.asarray(u, jnp.float32), "b": jnp.ones(2)}
    tx = ko.clip_by_rms(optax.identity(), max_rms=bound)
    clipped, state = tx.update(tree, tx.init(tree))
    rms = {k: float(np.sqrt(np.mean(np.square(np.asarray(v, float))))) for k, v in tree.items()}
    factors = {k: min(1.0, bound / r) if r > 1e-15 else 1.0 for k, r in rms.items()}
    for k in tree:
        np.testing.assert_allclose(
            clipped[k], factors[k] * np.asarray(tree[k]), rtol=1e-5, atol=1e-30
        )
    np.testing.assert_allclose(state.rms_scale, min(factors.values()), rtol=1e-5)


def test_without_layers_it_is_clip_by_block_rms_of_optax():
    params = {"w": 3 * jnp.ones((2, 3)), "b": jnp.full(2, 0.1)}
    tx = optax.chain(ko.clip_by_rms(optax.scale(3.0), max_rms=0.5))
    reference = optax.chain(optax.scale(3.0), optax.clip_by_block_rms(0.5))
    ours, theirs = (t.update(params, t.init(params))[0] for t in (tx, reference))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_rms_of_kernel_and_bias_together_for_every_copy_of_a_stack():
    grads, layers = stack()
    tx = ko.clip_by_rms(optax.identity(), max_rms=1.0, layers=layers)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    scales = []
    for before, after in zip(matrices(grads, layers), matrices(updates, layers), strict=True):
        scales.append(min(1, 1 / np.sqrt(np.mean(before**2))))
        np.testing.assert_allclose(after, scales[-1] * before, rtol=1e-6)
    assert len(set(scales)) > 2
    np.testing.assert_allclose(state.rms_scale, min(scales), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_layer_that_is_not_finite_is_left_as_it_is(bad):
    tx = ko.clip_by_rms(optax.identity(), max_rms=1.0)
    updates, _ = tx.update(
        {"a": jnp.array([bad, 1.0]), "b": jnp.full(2, 4.0)}, tx.init(jnp.ones(2))
    )
    np.testing.assert_array_equal(updates["a"], [bad, 1])
    np.testing.assert_array_equal(updates["b"], 1)


def test_graft_has_the_direction_of_one_and_the_norms_of_the_other():
    grads, layers = stack()
    adam = optax.scale_by_adam()
    tx = ko.graft_norm(optax.scale_by_sign(), norm_of=adam, layers=layers)
    state = tx.init(grads)
    update = jax.jit(tx.update)
    adam_state = adam.init(grads)
    for factor in (1.0, 2.0):
        now = jax.tree.map(lambda g: factor * np.asarray(g) ** 2 - np.asarray(g), grads)
        updates, state = update(now, state)
        lengths, adam_state = jax.jit(adam.update)(now, adam_state)
        triples = zip(
            *(matrices(t, layers) for t in (updates, jax.tree.map(np.sign, now), lengths)),
            strict=True,
        )
        for ours, s, q in triples:
            np.testing.assert_allclose(ours, s * np.linalg.norm(q) / np.linalg.norm(s), rtol=1e-5)
    chex.assert_trees_all_close(state.graft, adam_state, rtol=1e-6)


def test_graft_over_itself_changes_nothing_and_zero_stays_zero():
    grads, layers = stack()
    tx = ko.graft_norm(optax.scale(3.0), norm_of=optax.scale(3.0), layers=layers)
    chex.assert_trees_all_close(
        tx.update(grads, tx.init(grads))[0], jax.tree.map(lambda g: 3 * g, grads), rtol=1e-6
    )
    tx = ko.graft_norm(optax.set_to_zero())
    np.testing.assert_array_equal(tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0], 0)


def test_default_is_the_norm_of_the_gradient():
    tx = ko.graft_norm(optax.scale_by_sign())
    grads = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([-2.0])}
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["a"], [5 / np.sqrt(2), -5 / np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-2], rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 2])
def test_cold_start_then_the_preconditioner_with_all_it_has_seen(steps):
    """From `steps` on the result is that of a preconditioner that ran all along."""
    warm, cold = optax.scale_by_adam(), optax.trace(0.9)
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    tx = ko.cold_start(warm, steps=steps, initial=cold)
    update, state = jax.jit(tx.update), tx.init(params)
    warm_state, cold_state = warm.init(params), cold.init(params)
    for k in range(4):
        grads = jax.tree.map(lambda p: (k + 1) * jnp.cos(p), params)
        updates, state = update(grads, state)
        later, warm_state = warm.update(grads, warm_state)
        first, cold_state = cold.update(grads, cold_state)
        chex.assert_trees_all_close(updates, first if k < steps else later, rtol=1e-5)
    chex.assert_trees_all_close(state.preconditioner, warm_state, rtol=1e-5)
    assert int(state.cold_count) == 4


@pytest.mark.parametrize("name", RULES)
def test_extra_arguments_are_forwarded_in_a_chain_under_jit_and_scan(name):
    params = {"w": jnp.full((2, 2), 0.3, jnp.bfloat16), "b": jnp.ones(2)}
    tx = optax.chain(RULES[name](NEEDS_GAIN), optax.scale(0.5))

    @jax.jit
    def run(params):
        def body(state, _):
            updates, state = tx.update(params, state, params, gain=2.0)
            return state, updates

        # fails where a state changes its types
        return jax.lax.scan(body, tx.init(params), length=2)

    state, updates = run(params)
    h.assert_same_types(jax.eval_shape(tx.init, params), state)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    with pytest.raises(TypeError, match="gain"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("name", RULES)
def test_masked_leaves_pass(name):
    params = {"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 5.0)}
    tx = optax.masked(RULES[name](optax.scale(7.0)), {"w": True, "b": False})
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["b"], params["b"])
    assert not np.allclose(updates["w"], params["w"])


def test_bounds_may_be_schedules_or_injected():
    params = {"w": jnp.full((2, 2), 3.0)}
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    plain = ko.clip_by_rms(optax.identity(), max_rms=schedule)
    injected = optax.inject_hyperparams(ko.clip_by_rms)(optax.identity(), max_rms=schedule)
    for tx in (plain, injected):
        state = tx.init(params)
        for wanted in (1.0, 0.75, 0.5):
            updates, state = tx.update(params, state)
            np.testing.assert_allclose(updates["w"], wanted, rtol=1e-6)
    tx = optax.inject_hyperparams(ko.cold_start)(optax.scale_by_sign(), steps=1)
    state = tx.init(params)
    for wanted in (3.0, 1.0):
        updates, state = tx.update(params, state)
        np.testing.assert_array_equal(updates["w"], wanted)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="clip_by_rms: max_rms=0; expected max_rms > 0"):
        ko.clip_by_rms(optax.identity(), max_rms=0)
    with pytest.raises(ValueError, match="cold_start: steps=-1; expected steps >= 0"):
        ko.cold_start(optax.identity(), steps=-1)


def test_a_number_of_cold_steps_that_is_none_leaves_the_last_good_one():
    params = {"w": jnp.full((2, 2), 3.0)}
    tx = ko.cold_start(
        optax.scale_by_sign(), steps=lambda count: jnp.where(count == 1, jnp.nan, 3.0)
    )
    state = tx.init(params)
    for wanted in (3.0, 3.0, 3.0, 1.0):
        updates, state = jax.jit(tx.update)(params, state)
        np.testing.assert_array_equal(updates["w"], wanted)
    assert "1 values of steps" in ko.problems(state)[0]


def test_a_layer_adds_few_equations_to_kl_clip():
    """Programs of deep nets stay small: 16 layers of differing shapes against 8."""

    def size(count):
        grads = {str(i): jnp.ones((i + 1, 2)) for i in range(count)}
        clip = lambda u, v: ko.kl_scale(u, v, 1.0, 1.0)
        return equations(jax.make_jaxpr(clip)(grads, grads).jaxpr)

    assert (size(16) - size(8)) / 8 < 40
