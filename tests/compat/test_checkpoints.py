"""Checkpoints with Orbax, and the schedule decided on the host: training goes on exactly as without
them.
"""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import kfac_optax as ko
from tests import helpers as h
from tests.compat import interrupted_run

ROOT = pathlib.Path(__file__).parents[2]


def _exactly(a, b):
    h.assert_same_types(a, b)
    h.assert_equal(a, b)


@pytest.mark.parametrize("preset", h.PRESETS)
def test_orbax_round_trip(preset, tmp_path):
    """Saved and restored through `eval_shape(init)`, the state is bit for bit the same, and so is
    what follows.
    """
    problem = h.plain_problem()
    tx = h.make_tx(preset, problem)
    params, state, _ = h.reference_run(preset)  # after six steps
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step_6", {"params": params, "opt_state": state})
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda p: {"params": p, "opt_state": tx.init(p)}, problem.params)
        restored = checkpointer.restore(tmp_path / "step_6", shapes)
    _exactly(restored, {"params": params, "opt_state": state})
    assert int(optax.tree.get(restored["opt_state"], "kfac_count")) == 6

    if preset == "kfac_two_level":
        step = jax.jit(h.make_step(tx, problem))
        again, other = restored["params"], restored["opt_state"]
        for _ in range(4):  # statistics (every 2) and inverses (every 3) are due again
            params, state, _ = step(params, state)
            again, other, _ = step(again, other)
        _exactly((again, other), (params, state))


def test_orbax_names_are_stable(tmp_path):
    """Without a target Orbax gives the names on disk: our field names are a format, so changing one
    must be seen.
    """
    state = h.initial_state("kfac_two_level")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        raw = checkpointer.restore(tmp_path / "state")
    assert set(raw) == {"preconditioner", "kl_count", "kl_scale", "given"}
    assert set(raw["preconditioner"]) == {
        "kfac_count",
        "curvature_count",
        "skipped_statistics",
        "failed_inverses",
        "inverse_age",
        "damping",
        "non_finite_updates",
        "given",
        "coarse_share",
        "factors",
        "inverses",
        "coarse",
    }
    assert set(raw["preconditioner"]["coarse"]) == {
        "coarse_factors",
        "coarse_inverse",
        "coarse_sizes",
        "coarse_index",
    }
    (factors,) = raw["preconditioner"]["factors"].values()
    assert set(factors) == {"inputs", "outputs"}
    np.testing.assert_array_equal(
        factors["inputs"], optax.tree.get(state, "factors")["dense_5x4_bias"].inputs
    )


def test_host_schedule_is_the_traced_schedule():
    """25 steps of up to four compiled steps without branches against one compiled step with both
    branches.
    """
    problem = h.plain_problem()
    tx = h.make_tx("kfac_two_level", problem, curvature_every=3, inverse_every=6)
    traced_step = h.make_step(tx, problem)
    schedule = ko.HostSchedule(curvature_every=3, inverse_every=6)
    kinds = []

    def static_step(params, state, measure, refresh):
        kinds.append((measure, refresh))
        curvature = problem.at(params) if measure else None
        return traced_step(params, state, curvature=curvature, refresh=refresh)

    static, traced = (
        jax.jit(static_step, static_argnames=("measure", "refresh")),
        jax.jit(traced_step),
    )
    mine = theirs = (problem.params, jax.jit(tx.init)(problem.params))
    for i in range(25):
        *mine, updates = static(*mine, **schedule(i))
        *theirs, expected = traced(*theirs)
        h.assert_close(updates, expected)
        for name in ("kfac_count", "curvature_count", "inverse_age"):
            assert int(optax.tree.get(mine[1], name)) == int(optax.tree.get(theirs[1], name)), (
                i,
                name,
            )
    h.assert_close(mine, theirs)
    assert int(optax.tree.get(mine[1], "curvature_count")) == 9
    assert sorted(kinds) == [(False, False), (True, False), (True, True)], (
        "one compilation of each kind of step"
    )
    hlo = static.lower(*mine, measure=False, refresh=False).as_text()
    assert "stablehlo.case" not in hlo
    assert "stablehlo.if" not in hlo


def test_a_cholesky_checkpoint_does_not_pass_for_an_eigh_one(tmp_path):
    """Another form of inverse is another state: restoring it as such fails instead of filling in
    nonsense.
    """
    problem = h.plain_problem()
    saved = jax.jit(h.make_tx("kfac", problem, inverse="cholesky").init)(problem.params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(h.make_tx("kfac", problem).init, problem.params)
        with pytest.raises(ValueError, match=r"(?i)structure|mismatch|not match|missing"):
            checkpointer.restore(tmp_path / "state", target)


def test_a_run_killed_while_it_saves_goes_on_bit_for_bit(tmp_path):
    """`kill -9` in the middle of an asynchronous save: the checkpoint before it is whole, the half
    one is not seen, and the steps that follow are those of a run without an end. The same checkpoint
    goes to two devices and back.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.compat.interrupted_run", tmp_path],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    left = {path.name for path in (tmp_path / "steps").iterdir()}
    assert str(interrupted_run.LOST) not in left and len(left) == 2, left

    kept, shapes = interrupted_run.KEPT, interrupted_run.shapes_of_a_run()
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        assert manager.latest_step() == kept
        restored = interrupted_run.restore(manager, kept, shapes)
    step, (params, state) = interrupted_run.compiled_step(), interrupted_run.start()
    for _ in range(kept):
        params, state, _ = step(params, state)
    _exactly(restored, {"params": params, "opt_state": state})
    again = restored["params"], restored["opt_state"]
    for _ in range(4):  # statistics (every 2) and inverses (every 3) are due again
        params, state, _ = step(params, state)
        again = step(*again)[:2]
    _exactly(again, (params, state))

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    on_one = jax.tree.map(lambda x: x.update(sharding=one), shapes)
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "of_two_devices", on_one)
    h.assert_equal(back, restored)
