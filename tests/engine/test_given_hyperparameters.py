"""Hyperparameters that schedules and `inject_hyperparams` give: what makes no sense is not used,
but named.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax._legal import LEGAL
from kfac_optax._validate import checked, start_checked
from tests import helpers as h

BAD = {
    "damping": (-1.0, np.nan, np.inf),
    "decay": (-0.1, 1.5, np.nan),
    "curvature_every": (0.0, np.nan, -3.0),
    "inverse_every": (0.0, np.nan, np.inf),
    "learning_rate": (-1.0, np.nan),
    "kl_clip": (-1.0, 0.0, np.nan),
}


def _spoilt(good, bad):
    """Good in step 0 and from step 2 on, bad in step 1."""
    return lambda count: jnp.where(count == 1, bad, good).astype(jnp.float32)


@pytest.fixture(scope="module")
def train():
    problem = h.plain_problem()
    base = {
        "learning_rate": 0.1,
        "damping": 0.1,
        "kl_clip": 1e-2,
        "decay": 0.9,
        "curvature_every": 1,
        "inverse_every": 2,
    }

    def run(steps=3, **changes):
        tx = ko.kfac_two_level(problem.layers, bound="damped", **(base | changes))
        params, state = problem.params, tx.init(problem.params)
        update = jax.jit(lambda p, s: tx.update(problem.grad(p), s, p, curvature=problem.at(p)))
        for _ in range(steps):
            updates, state = update(params, state)
            params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
        return params, state

    return run, base, run()[0]


@pytest.mark.parametrize(
    ("name", "bad"), [(name, bad) for name, values in BAD.items() for bad in values]
)
def test_a_bad_value_of_a_schedule_leaves_the_last_good_one(train, name, bad):
    run, base, expected = train
    params, state = run(**{name: _spoilt(base[name], bad)})
    h.assert_close(params, expected)
    (sentence,) = ko.problems(state)
    assert sentence.startswith(f"1 values of {name} ")


def test_before_any_good_value_the_default_is_used(train):
    run, _, _ = train
    always = lambda count: jnp.full((), jnp.nan) + 0 * count
    params, state = run(damping=always)
    h.assert_close(params, run(damping=LEGAL["damping"].default)[0])
    assert "3 values of damping" in ko.problems(state)[0]
    assert float(ko.diagnostics(state)["damping"]) == pytest.approx(1e-3)


def test_injected_and_extra_values_are_checked_too():
    problem = h.plain_problem()
    tx = optax.inject_hyperparams(ko.kfac, static_args=("layers", "kl_clip"))(
        problem.layers, damping=0.1, kl_clip=None
    )
    state = tx.init(problem.params)
    state.hyperparams["damping"] = jnp.float32(-1.0)
    updates, state = tx.update(
        problem.grad(problem.params), state, problem.params, curvature=problem.at(problem.params)
    )
    plain = ko.kfac(problem.layers, damping=0.1, kl_clip=None)
    arguments = problem.grad(problem.params), plain.init(problem.params), problem.params
    expected, _ = plain.update(*arguments, curvature=problem.at(problem.params))
    h.assert_close(updates, expected)
    assert "values of damping" in ko.problems(state)[0]

    updates, state = plain.update(
        *arguments, curvature=problem.at(problem.params), damping=jnp.float32(jnp.nan)
    )
    h.assert_close(updates, expected)
    assert "values of damping" in ko.problems(state)[0]
    # what is known beforehand is an error, there as at construction
    with pytest.raises(ValueError, match=r"update: damping=-1.0; expected damping >= 0"):
        plain.update(*arguments, curvature=problem.at(problem.params), damping=-1.0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda x: ko.clip_by_rms(optax.identity(), max_rms=x), "max_rms"),
        (
            lambda x: ko.clip_by_trust_region(optax.identity(), learning_rate=1.0, radius=x),
            "radius",
        ),
        (lambda x: ko.add_weight_decay(optax.identity(), x, mode="decoupled"), "weight_decay"),
        (lambda x: ko.cold_start(optax.scale(2.0), steps=x), "steps"),
    ],
)
def test_of_every_step_rule(make, name):
    tx, good = make(_spoilt(0.01, -1.0)), make(0.01)
    params, state, other = (
        jnp.ones(3),
        make(_spoilt(0.01, -1.0)).init(jnp.ones(3)),
        good.init(jnp.ones(3)),
    )
    for _ in range(2):
        updates, state = tx.update(2 * params, state, params)
        expected, other = good.update(2 * params, other, params)
        np.testing.assert_array_equal(updates, expected)
    assert f"1 values of {name}" in ko.problems(state)[0]
    assert jax.tree.structure(state) == jax.tree.structure(other)


def test_the_memory_keeps_its_types_and_follows_good_values():
    memory = start_checked(damping=0.5)
    for given, wanted in ((0.25, 0.25), (-1.0, 0.25), (2.0, 2.0), (jnp.nan, 2.0)):
        value, new = jax.jit(lambda m, x: checked(m, "damping", x, jnp.int32(0)))(
            memory, jnp.float32(given)
        )
        h.assert_same_types(new, memory)
        assert float(value) == wanted
        memory = new
    assert int(memory["given_damping"].ignored_values) == 2
