"""Cart-pole against a step in NumPy; what an actor-critic makes of it; the command."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import kfac_optax as ko
from kfac_optax.experiments import a2c, actor_critic, cartpole
from tests.experiments.conftest import read_config

ROOT = Path(__file__).parents[2]


def numpy_step(x, action):
    """The cart-pole equations as in the paper's appendix, solved for both accelerations as a linear
    system.
    """
    _, velocity, angle, spin = x
    m, big_m, half, g = 0.1, 1.0, 0.5, 9.8
    force = 10.0 if action else -10.0
    # (M + m) a + m l w' cos = F + m l w^2 sin and m l cos a + (4/3) m l^2 w' = m g l sin, l half
    # the length
    matrix = np.array(
        [[big_m + m, m * half * np.cos(angle)], [m * half * np.cos(angle), 4 / 3 * m * half**2]]
    )
    right = np.array([force + m * half * spin**2 * np.sin(angle), m * g * half * np.sin(angle)])
    acceleration, turn = np.linalg.solve(matrix, right)
    return x + 0.02 * np.array([velocity, acceleration, spin, turn])


def test_a_step_solves_the_equations_of_motion(x64):
    rng = np.random.default_rng(0)
    states, actions = rng.uniform(-1, 1, (50, 4)), rng.integers(0, 2, 50)
    moved = jax.jit(jax.vmap(cartpole.move))(jnp.asarray(states), jnp.asarray(actions))
    expected = [numpy_step(x, a) for x, a in zip(states, actions, strict=True)]
    np.testing.assert_allclose(moved, expected, rtol=1e-12, atol=1e-14)


def test_mirrored_states_move_alike(x64):
    x = jnp.asarray([0.3, -0.2, 0.1, 0.7])
    np.testing.assert_allclose(cartpole.move(x, 1), -cartpole.move(-x, 0), rtol=1e-14)


@pytest.mark.parametrize(
    ("observation", "steps", "terminated", "truncated"),
    [
        ([2.39, 0.0, 0.0, 0.0], 0, False, False),
        ([2.39, 1.0, 0.0, 0.0], 0, True, False),
        ([-2.39, -1.0, 0.0, 0.0], 0, True, False),
        ([0.0, 0.0, 0.20, 0.0], 0, False, False),
        ([0.0, 0.0, 0.20, 1.0], 0, True, False),
        ([0.0, 0.0, -0.20, -1.0], 0, True, False),
        ([0.0, 0.0, 0.0, 0.0], 498, False, False),
        ([0.0, 0.0, 0.0, 0.0], 499, False, True),
        ([2.39, 1.0, 0.0, 0.0], 499, True, False),
    ],
)
def test_episodes_end_at_the_limits_and_start_again(observation, steps, terminated, truncated):
    before = cartpole.State(jnp.asarray(observation), jnp.int32(steps))
    after, outcome = step(jax.random.key(1), before, 1)
    assert (bool(outcome.terminated), bool(outcome.truncated)) == (terminated, truncated)
    assert float(outcome.reward) == 1
    np.testing.assert_allclose(
        outcome.observation, numpy_step(np.array(observation), 1), rtol=1e-5, atol=1e-6
    )
    if terminated or truncated:
        assert int(after.steps) == 0
        assert 0 < np.abs(after.observation).max() <= 0.05
        other, _ = step(jax.random.key(2), before, 1)
        assert np.abs(after.observation - other.observation).max() > 1e-4
    else:
        assert int(after.steps) == steps + 1
        np.testing.assert_array_equal(after.observation, outcome.observation)


step = jax.jit(cartpole.step)


def test_advantages_are_discounted_sums_of_errors_within_an_episode():
    """Against the double sum, with an episode that terminates and one whose time is up."""
    rng = np.random.default_rng(0)
    shape, discount, trace, scale = (6, 2), 0.9, 0.8, 0.5
    value, following = rng.normal(size=shape), rng.normal(size=shape)
    terminated, truncated = np.zeros(shape, bool), np.zeros(shape, bool)
    terminated[2, 0] = truncated[3, 1] = True
    outcome = cartpole.Outcome(
        None, jnp.ones(shape), jnp.asarray(terminated), jnp.asarray(truncated)
    )
    batch = a2c.Batch(None, None, jnp.asarray(value, jnp.float32), outcome, None)
    got = a2c.advantages(
        batch, jnp.asarray(following, jnp.float32), discount=discount, trace=trace, scale=scale
    )
    errors = scale + discount * following * ~terminated - value
    for t, env in np.ndindex(*shape):
        expected, weight = 0.0, 1.0
        for k in range(t, shape[0]):
            expected += weight * errors[k, env]
            weight *= discount * trace
            if (terminated | truncated)[k, env]:
                break
        np.testing.assert_allclose(got[t, env], expected, rtol=1e-5)


def test_joint_fisher_is_that_of_both_heads(x64):
    """With a shared trunk too: `F = F_policy + F_value`, one forward pass."""
    model = a2c.ActorCritic((5,), shared=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
    params = jax.tree.map(lambda p: p.astype(x.dtype), model.init(jax.random.key(0), x)["params"])
    v = jax.tree.map(jnp.cos, params)

    @functools.partial(jax.jit, static_argnums=0)
    def product(heads):
        predict = lambda p, x: {name: model.apply({"params": p}, x)[name] for name in heads}
        return ko.ggn(predict).vector_product(params, v, x)

    joint, policy, value = (
        product(heads) for heads in (("policy", "value"), ("policy",), ("value",))
    )
    for a, b, c in zip(*map(jax.tree.leaves, (joint, policy, value)), strict=True):
        np.testing.assert_allclose(a, b + c, rtol=1e-10, atol=1e-14)


def small(**changes):
    config = read_config("cartpole_acktr")
    config.update(
        seeds=2, steps=640, environments=4, rollout=8, points=4, shown=(0.5, 1.0), widths=(8,)
    )
    config.grid = {"acktr": (1.0,), "rmsprop": (1e-2, 1e-3)}
    config.update(changes)
    return config


def test_acktr_learns_to_keep_the_pole_up():
    """Ten thousand steps of random actions keep it up for 22 steps; those of the second half of
    training do far better.
    """
    config = small(steps=16_000, environments=16, rollout=20, widths=(16,), shared=True)
    config.acktr.cold_steps = 2
    run = jax.jit(functools.partial(a2c.train, config, a2c.METHODS["acktr"]))
    log = run(jnp.float32(1.0), jax.random.key(0))
    assert all(np.isfinite(x).all() for x in log)
    parts = [np.split(np.asarray(x, float), 2) for x in (log.total, log.episodes)]
    first, second = (total.sum() / episodes.sum() for total, episodes in zip(*parts, strict=True))
    still = run(jnp.float32(0.0), jax.random.key(0))
    random = float(still.total.sum() / still.episodes.sum())
    assert 18 < random < 27
    assert second > 2 * random
    assert second > first


def test_the_command_leaves_its_files(tmp_path):
    command = [
        sys.executable,
        "-m",
        "kfac_optax.experiments.actor_critic",
        "--config=configs/cartpole_acktr.py",
    ]
    command += [
        f"--config.out={tmp_path}",
        "--config.seeds=2",
        "--config.steps=640",
        "--config.environments=4",
    ]
    command += [
        "--config.rollout=8",
        "--config.points=4",
        "--config.widths=(4,)",
        "--config.grid.acktr=()",
    ]
    command += ["--config.grid.adam=()", "--config.grid.rmsprop=(1e-2, 1e-3)"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "A2C, RMSProp" in done.stdout and "640 steps" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {
        "curves.csv",
        "summary.csv",
        "summary.json",
        "returns.png",
    }
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 2 * 2 * 4
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["optimizer"] for row in summary["summary"] if row["best"]] == ["rmsprop"]
    assert all(5 < row["return_mean"] < 500 for row in summary["summary"])


def fake_runs(rates):
    """Seed 1 is always 10 better; returns say which rate it was."""
    make = lambda level: [
        actor_critic.Run(s, np.full(4, level + 10.0 * s), np.ones(4), 2.0) for s in range(2)
    ]
    return {key: make(level) for key, level in rates.items()}


def test_tables_compare_the_best_rates():
    config = small()
    runs = fake_runs({("acktr", 1.0): 100, ("rmsprop", 1e-2): 50, ("rmsprop", 1e-3): 60})
    assert actor_critic.best_rates(runs) == {"acktr": 1.0, "rmsprop": 1e-3}
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(actor_critic.table(config, runs))
    rows = [line.split() for line in capture.get().splitlines()]
    half = f"{5 * math.sqrt(2) * 12.7062 / math.sqrt(2):.0f}"
    assert ["ACKTR", "1", "105", "±", half, "105", "±", half, "2.0", "±", "0.0"] in rows
    assert [
        "A2C,",
        "RMSProp",
        "0.001*",
        "65",
        "±",
        half,
        "65",
        "±",
        half,
        "2.0",
        "±",
        "0.0",
    ] in rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "config.seeds: got 0, expected a positive number"),
        (
            {"steps": 650},
            "config.steps: got 650, expected a multiple of environments . rollout . points = 128",
        ),
        ({"grid": {"sgd": (1.0,)}}, "config.grid: got 'sgd', expected one of"),
        (
            {"grid": {"adam": ()}},
            "config.grid: got no rates, expected some for at least one optimizer",
        ),
        (
            {"grid": {"adam": (0.0,)}},
            "config.grid.adam: got .0.0,., expected positive learning rates",
        ),
    ],
)
def test_bad_settings_are_refused(change, message):
    config = read_config("cartpole_acktr")
    if "grid" in change:
        config.grid = change.pop("grid")
    else:
        config.update(environments=4, rollout=8, points=4, **change)
    with pytest.raises(ValueError, match=message):
        actor_critic.compare(config, Console())
