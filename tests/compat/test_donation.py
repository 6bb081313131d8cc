"""Donating parameters and state to a compiled step."""

import jax
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h

both = pytest.mark.parametrize("preset", h.PRESETS)


def _buffers(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer() for path, leaf in leaves}


def _copy(tree):
    return jax.tree.map(lambda x: x.copy(), tree)


@both
@pytest.mark.parametrize("compiled", [False, True], ids=["eager init", "jitted init"])
def test_no_two_leaves_share_a_buffer(preset, compiled):
    """A buffer that occurs twice in donated arguments is a run-time error, so state leaves are all
    their own.
    """
    problem = h.plain_problem()
    init = h.make_tx(preset, problem).init
    params = _copy(problem.params)
    state = (jax.jit(init) if compiled else init)(params)
    owned = _buffers({"params": params, "state": state})
    twice = {name for name, buffer in owned.items() if list(owned.values()).count(buffer) > 1}
    assert twice == set()


def test_a_damping_array_is_copied():
    """A hyperparameter given as an array (as `inject_hyperparams` does) is not given away with the
    state.
    """
    problem = h.plain_problem()
    damping = jax.numpy.float32(0.05)
    state = h.make_tx("kfac", problem, damping=damping).init(problem.params)
    assert damping.unsafe_buffer_pointer() not in _buffers(state).values()

    injected = optax.inject_hyperparams(ko.kfac)(problem.layers, learning_rate=0.1, damping=damping)
    state = injected.init(problem.params)
    assert not set(_buffers(state.hyperparams).values()) & set(_buffers(state.inner_state).values())


def test_donated_training():
    """From an eager `init`, parameters and state are given away in every step; the result is that
    of keeping them.
    """
    problem = h.plain_problem()
    tx = h.make_tx("kfac_two_level", problem)
    step = jax.jit(h.make_step(tx, problem), donate_argnums=(0, 1))
    params, state = _copy(problem.params), tx.init(problem.params)
    for _ in range(6):
        given = jax.tree_util.tree_leaves_with_path((params, state))
        params, state, _ = step(params, state)
        kept = {path[-1].name for path, leaf in given if not leaf.is_deleted()}
        # a step does not read the last one's values of these, so the compiled program never takes
        # them
        assert kept <= {"damping", "coarse_share", "kl_scale"}
    h.assert_close((params, state), h.reference_run("kfac_two_level")[:2])
