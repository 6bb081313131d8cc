"""The step of `bound_step` against dense matrices, momentum included; the coarse part as far as the
model agrees.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_optax as ko
from kfac_optax.step_rules.quadratic_model import agreed_mix
from tests import helpers as h
from tests import oracles

DAMPING, MOMENTUM = 0.05, 0.9
LABELS = (0, 1, 1, 0, 1, 0, 1, 1)


def problem():
    """Three layers in double precision."""
    return h.classes_problem((3, 4, 4, 2), LABELS)


def loss_of(params, x):
    return oracles.classifier(params, x).mean_nll(jnp.asarray(LABELS))


gradient = jax.grad(loss_of)


def inner_preconditioner(layers, two_level):
    coupling = ko.coarse_correction("exact") if two_level else None
    return ko.scale_by_curvature(
        layers,
        block=ko.kronecker(),
        coupling=coupling,
        damping=DAMPING,
        separate=two_level,
        curvature_every=1,
        inverse_every=1,
    )


def dense_fisher(params, x):
    columns = jnp.asarray(oracles.softmax_columns(oracles.forward(params, x)[0]))
    return oracles.exact_fisher(*oracles.per_example(params, x, columns))


def dense_step(fisher, parts, grad, previous, kl_clip):
    """`s (m T0 - rate U - coarse_rate U_c)` from dense matrices; the model is minimised by a search
    over the mix.
    """
    damped = fisher + DAMPING * np.eye(len(fisher))
    behind = grad + MOMENTUM * damped @ previous

    def best(share):
        direction = -parts[0] - (share * parts[1] if len(parts) > 1 else 0)
        rate = max(0.0, -(behind @ direction) / (direction @ damped @ direction))
        return (
            rate,
            direction,
            rate * behind @ direction + rate**2 * direction @ damped @ direction / 2,
        )

    shares = np.linspace(0, 1, 20001) if len(parts) > 1 else [0.0]
    rate, direction, _ = min((best(share) for share in shares), key=lambda found: found[2])
    whole = MOMENTUM * previous + rate * direction
    square = whole @ fisher @ whole
    return min(1.0, np.sqrt(kl_clip / (1 - MOMENTUM) ** 2 / square)) * whole


@pytest.mark.parametrize(
    ("two_level", "kl_clip"), [(False, 1e3), (False, 1e-6), (True, 1e3), (True, 1e-6)]
)
def test_steps_are_those_of_dense_matrices_with_momentum_in_them(x64, two_level, kl_clip):
    _, params, x, _, estimator, layers = problem()
    inside = inner_preconditioner(layers, two_level)
    bounded = ko.bound_step(
        inside, learning_rate=0.3, kl_clip=kl_clip, momentum=MOMENTUM, damping=DAMPING
    )
    tx = optax.chain(bounded, optax.sgd(0.3, momentum=MOMENTUM))

    @jax.jit
    def step(params, state, inner_state):
        grad, curvature = gradient(params, x), estimator.at(params, x)
        parts, inner_state = inside.update(grad, inner_state, params, curvature=curvature)
        updates, state = tx.update(grad, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, inner_state, grad, parts

    state, inner_state, previous = tx.init(params), inside.init(params), 0.0
    for _ in range(3):
        new, state, inner_state, grad, parts = step(params, state, inner_state)
        moved = oracles.flatten(new) - oracles.flatten(params)
        trees = parts.parts if two_level else (parts,)
        previous = previous * np.ones_like(moved)
        expected = dense_step(
            dense_fisher(params, x),
            [oracles.flatten(t) for t in trees],
            oracles.flatten(grad),
            previous,
            kl_clip,
        )
        # the search over the mix has steps of 5e-5
        np.testing.assert_allclose(
            moved, expected, rtol=1e-3 if two_level else 1e-9, atol=1e-5 * np.abs(expected).max()
        )
        params, previous = new, moved


def train(tx, steps=6, rate_of=lambda i: 1.0):
    _, params, x, _, estimator, _ = problem()

    @jax.jit
    def step(params, state, scale):
        updates, state = tx.update(
            gradient(params, x), state, params, curvature=estimator.at(params, x)
        )
        return optax.apply_updates(params, jax.tree.map(lambda u: scale * u, updates)), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, rate_of(i))
    return params, state


def test_the_level_of_the_rate_has_no_influence(x64):
    layers = problem().layers

    def run(rate):
        tx = ko.kfac_two_level(
            layers, learning_rate=rate, damping=DAMPING, bound="exact", balance="model"
        )
        return train(optax.chain(tx, optax.sgd(rate, momentum=0.9)))[0]

    expected = oracles.flatten(run(1.0))
    for rate in (1e-5, 0.1, 30.0):
        np.testing.assert_allclose(oracles.flatten(run(rate)), expected, rtol=1e-8)


def test_a_schedule_shrinks_steps_in_proportion_to_the_largest_rate_so_far(x64):
    layers, params = problem().layers, problem().params
    first = optax.piecewise_constant_schedule(0.2, {1: 0.25})

    def run(schedule):
        tx = ko.kfac(
            layers,
            learning_rate=schedule,
            damping=DAMPING,
            bound="exact",
            momentum=0.0,
            inverse_every=1,
        )
        chain = optax.chain(tx, optax.sgd(schedule))
        one, _ = train(chain, steps=1)
        two, _ = train(chain, steps=2)
        return oracles.flatten(one) - oracles.flatten(params), oracles.flatten(
            two
        ) - oracles.flatten(one)

    (constant, constant_second), (same, second) = run(lambda count: 0.2), run(first)
    np.testing.assert_allclose(same, constant, rtol=1e-10)
    np.testing.assert_allclose(second, 0.25 * constant_second, rtol=1e-8)


def test_without_curvature_the_first_step_is_that_of_kl_clip_and_later_ones_repeat_the_rates(x64):
    _, params, x, _, estimator, layers = problem()
    grad, options = gradient(params, x), {"learning_rate": 0.1, "kl_clip": 1e-4, "damping": DAMPING}
    exact, damped = ko.kfac(layers, bound="exact", **options), ko.kfac(layers, **options)
    first, state = exact.update(grad, exact.init(params), params, curvature=None)
    expected, _ = damped.update(grad, damped.init(params), params, curvature=None)
    np.testing.assert_allclose(oracles.flatten(first), oracles.flatten(expected), rtol=1e-10)
    measured, state = exact.update(
        grad, exact.init(params), params, curvature=estimator.at(params, x)
    )
    # the parameters stay where they are: no momentum in between
    again, _ = exact.update(grad, state, params, curvature=None)
    np.testing.assert_allclose(oracles.flatten(again), oracles.flatten(measured), rtol=1e-10)
    larger, _ = exact.update(jax.tree.map(lambda g: 4 * g, grad), state, params, curvature=None)
    # sixteen times the slope: a quarter of the rates, and so the same step
    np.testing.assert_allclose(oracles.flatten(larger), oracles.flatten(measured), rtol=1e-10)


@pytest.mark.parametrize(
    "preset",
    [
        functools.partial(ko.kfac, bound="exact"),
        functools.partial(ko.kfac_two_level, bound="exact", balance="model"),
        functools.partial(ko.kfac_two_level, bound="movement"),
    ],
)
def test_one_bad_step_is_survived(preset):
    with jax.enable_x64(True):
        _, params, x, _, estimator, layers = problem()
    params, x = jax.tree.map(lambda p: p.astype(jnp.float32), params), x.astype(jnp.float32)
    tx = optax.chain(
        preset(layers, learning_rate=0.1, damping=DAMPING),
        optax.sgd(0.1, momentum=0.9),
    )

    good = x

    @jax.jit
    def step(params, state, factor, x):
        grad = jax.tree.map(lambda g: factor * g, gradient(params, good))
        updates, state = tx.update(grad, state, params, curvature=estimator.at(params, x))
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), float(loss_of(params, x))
    for i in range(60):
        factor = {5: 1e20, 9: jnp.inf, 13: jnp.nan}.get(i, 1.0)
        params, state = step(params, state, factor, jnp.full_like(x, jnp.nan) if i == 17 else x)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((params, state)))
    assert float(loss_of(params, x)) < 0.5 * start


def test_state_keeps_its_types_in_a_scan_and_needs_params():
    with jax.enable_x64(True):
        _, params, x, _, estimator, layers = problem()
    params, x = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16)
    tx = ko.kfac_two_level(layers, learning_rate=0.1, bound="exact", balance="model")

    def body(state, _):
        _, state = tx.update(params, state, params, curvature=estimator.at(params, x))
        return state, None

    state, _ = jax.jit(lambda state: jax.lax.scan(body, state, length=2))(tx.init(params))
    assert int(state.bound_count) == 2
    scalars = ko.diagnostics(state)
    assert {"step_rate", "coarse_rate", "bound_scale"} <= set(scalars)
    with pytest.raises(ValueError, match="got no params"):
        tx.update(params, state, curvature=None)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), rank=st.integers(1, 4))
def test_the_model_falls_no_less_with_the_agreed_mix_than_along_the_first_part(seed, rank):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(rank, 2)) * np.exp(rng.normal(size=2))
    form, slope = rows.T @ rows + 1e-6 * np.eye(2), rng.normal(size=2)
    slope[0] = -abs(slope[0])  # the fine part goes down
    mix = np.asarray(
        agreed_mix(jnp.asarray(form, jnp.float32), jnp.asarray(slope, jnp.float32)), float
    )
    assert mix[0] == 1
    assert 0 <= mix[1] <= 1

    def fall(direction):
        return (slope @ direction) ** 2 / (direction @ form @ direction)

    assert fall(mix) >= fall(np.array([1.0, 0.0])) * (1 - 1e-4)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), k=st.integers(2, 5))
def test_several_directions_are_solved_together(seed, k):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2 * k, k))
    form, slope = rows.T @ rows / k, rng.normal(size=k)
    with jax.enable_x64(True):
        free = ko.solve_model(jnp.asarray(form), jnp.asarray(slope))
        np.testing.assert_allclose(
            free.weights, -np.linalg.solve(form, slope), rtol=1e-8, atol=1e-10
        )
        fixed = ko.solve_model(jnp.asarray(form), jnp.asarray(slope), momentum=0.7)
        rest = -np.linalg.solve(form[:-1, :-1], slope[:-1] + 0.7 * form[:-1, -1])
        np.testing.assert_allclose(fixed.weights, [*rest, 0.7], rtol=1e-8, atol=1e-10)
        twice = np.concatenate([form, form[:1]])  # a copy of the first direction, last
        twice = np.concatenate([twice, twice[:, :1]], axis=1)
        dependent = ko.solve_model(jnp.asarray(twice), jnp.append(jnp.asarray(slope), slope[0]))
        np.testing.assert_allclose(dependent.weights, [*free.weights, 0], rtol=1e-6, atol=1e-8)


def test_the_coarse_part_enters_as_far_as_the_model_agrees(x64):
    _, params, x, _, estimator, layers = problem()
    grad, curvature = gradient(params, x), estimator.at(params, x)
    inside = inner_preconditioner(layers, two_level=True)
    parts, _ = inside.update(grad, inside.init(params), params, curvature=curvature)
    balanced = ko.balance_parts(inside, damping=DAMPING)
    update, state = balanced.update(grad, balanced.init(params), params, curvature=curvature)
    fine, coarse = (oracles.flatten(part) for part in parts.parts)
    damped = dense_fisher(params, x) + DAMPING * np.eye(len(fine))
    both, flat = np.stack([fine, coarse]), oracles.flatten(grad)
    first, second = np.linalg.solve(both @ damped @ both.T, both @ flat)
    weight = float(np.clip(second / first, 0, 1))
    np.testing.assert_allclose(state.coarse_weight, weight, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(
        oracles.flatten(update), fine + weight * coarse, rtol=1e-8, atol=1e-12
    )


def test_three_directions_of_the_adaptive_preset_are_never_a_worse_model_than_two(x64):
    _, params, x, _, estimator, layers = problem()
    loss = lambda p: loss_of(p, x)
    changes = {}
    for name, tx in {
        "one level": ko.kfac_adaptive(layers),
        "sum": ko.kfac_two_level_adaptive(layers, coarse="exact"),
        "model": ko.kfac_two_level_adaptive(layers, coarse="exact", balance="model"),
    }.items():
        value, grad = jax.value_and_grad(loss)(params)
        _, state = tx.update(
            grad,
            tx.init(params),
            params,
            curvature=estimator.at(params, x),
            value=value,
            value_fn=loss,
        )
        changes[name] = float(optax.tree.get(state, "damped_change"))
    assert changes["model"] <= changes["one level"] + 1e-12
    assert changes["model"] <= changes["sum"] + 1e-12
    assert changes["model"] < 0


@pytest.mark.parametrize("words", [{"bound": "exact"}, {"bound": "movement"}, {"balance": "model"}])
def test_a_forgotten_curvature_is_an_error(words):
    with jax.enable_x64(True):
        _, params, _, _, _, layers = problem()
        tx = ko.kfac_two_level(layers, learning_rate=0.1, **words)
        with pytest.raises(ValueError, match="got no `curvature`"):
            tx.update(params, tx.init(params), params)


def test_a_space_that_the_additive_correction_has_not_is_refused():
    with pytest.raises(ValueError, match="coarse_space='krylov' with correction='additive'"):
        ko.kfac_two_level(h.plain_problem().layers, learning_rate=0.1, coarse_space="krylov")


@pytest.mark.parametrize(("word", "value"), [("bound", "exakt"), ("balance", "both")])
def test_unknown_words_are_named(word, value):
    with pytest.raises(ValueError, match=f"{word}='{value}'; expected one of"):
        ko.kfac_two_level(h.plain_problem().layers, learning_rate=0.1, **{word: value})
