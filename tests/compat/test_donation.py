"""Donating parameters and state to a compiled step."""

import jax
import optax
import pytest

from tests import helpers as h

both = pytest.mark.parametrize("preset", h.PRESETS)


def _buffers(tree):
    return {
        jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _copy(tree):
    return jax.tree.map(lambda x: x.copy(), tree)


@both
@pytest.mark.parametrize("compiled", [False, True], ids=["eager init", "jitted init"])
def test_no_two_leaves_share_a_buffer(preset, compiled):
    """A buffer that occurs twice in donated arguments is a run-time error, so state leaves are all their own."""
    problem = h.plain_problem()
    init = h.make_tx(preset, problem).init
    params = _copy(problem.params)
    state = (jax.jit(init) if compiled else init)(params)
    owned = _buffers({"params": params, "state": state})
    twice = {name for name, buffer in owned.items() if list(owned.values()).count(buffer) > 1}
    assert twice == set()


@both
def test_donated_training(preset):
    """From an eager `init`, parameters and state are given away in every step, and the result is that of keeping them."""
    problem = h.plain_problem()
    tx = optax.chain(h.make_tx(preset, problem))
    step = jax.jit(h.make_step(tx, problem), donate_argnums=(0, 1))
    params, state = _copy(problem.params), tx.init(problem.params)
    for i in range(6):
        given = params, state
        params, state, _ = step(params, state)
        if i == 0 and jax.default_backend() != "cpu":
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    h.assert_close((params, state[0]), h.reference_run(preset)[:2])


def test_donation_is_used():
    """Every parameter and state buffer finds an output of its type to live on in (XLA would warn otherwise)."""
    problem = h.plain_problem()
    tx = h.make_tx("kfac_two_level", problem)
    step = jax.jit(h.make_step(tx, problem), donate_argnums=(0, 1))
    params = _copy(problem.params)
    state = _copy(h.initial_state("kfac_two_level"))
    names = _buffers({"params": params, "state": state})
    step(params, state)
    kept = [
        name
        for name, leaf in zip(names, jax.tree.leaves({"params": params, "state": state}), strict=True)
        if not leaf.is_deleted()
    ]
    assert kept == []
