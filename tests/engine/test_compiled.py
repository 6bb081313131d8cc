"""Steps compiled by kind: the numbers of the traced schedule, and the host's count."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import kfac_optax as ko
from tests import helpers as h

PERIODS = {"curvature_every": 2, "inverse_every": 4}


@functools.cache
def _tx():
    return optax.chain(h.make_tx("kfac", h.plain_problem(), **PERIODS), optax.sgd(0.05, 0.9))


def _train_step(params, state, **due):
    problem = h.plain_problem()
    updates, state = _tx().update(
        problem.grad(params), state, params, curvature=problem.at(params), **due
    )
    return optax.apply_updates(params, updates), state


def _start():
    params = jax.tree.map(jnp.copy, h.plain_params())
    return params, jax.jit(_tx().init)(params)


def _run(step, params, state, steps):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@functools.cache
def _traced_run(steps):
    return _run(jax.jit(_train_step), *_start(), steps)


@functools.cache
def _compiled():
    return ko.compile_step(_train_step, ko.HostSchedule(**PERIODS), donate_argnums=(0, 1))


def test_numbers_are_those_of_the_traced_schedule():
    """Every leaf of parameters and state; what the compiler rounds differently is all that may
    differ.
    """
    h.assert_close(_run(_compiled(), *_start(), 9), _traced_run(9), rtol=1e-5, atol=1e-6)


def test_numbers_are_those_of_static_arguments_bit_for_bit():
    schedule = ko.HostSchedule(**PERIODS)
    by_hand = jax.jit(_train_step, static_argnames=("measure", "refresh"))
    params, state = _start()
    for count in range(5):
        params, state = by_hand(params, state, **schedule(count))
    h.assert_equal(_run(_compiled(), *_start(), 5), (params, state))


def test_each_kind_is_traced_once():
    traces = []

    def step(params, state, **due):
        traces.append(tuple(due.values()))
        return _train_step(params, state, **due)

    compiled = ko.compile_step(step, ko.HostSchedule(**PERIODS))
    _run(compiled, *_start(), 9)
    _run(compiled, *_start(), 2)
    assert sorted(traces) == [(False, False), (True, False), (True, True)]
    assert compiled.count == 2 and len(compiled.kinds) == 3
    for kind, function in compiled.kinds.items():
        text = str(jax.make_jaxpr(function)(*_start()))
        assert "cond[" not in text
        assert ("cholesky" in text or "eigh" in text) == dict(kind)["refresh"]


def test_donated_arguments_are_gone_and_the_state_lives_on():
    params, state = _start()
    first = jax.tree.leaves(params)[0]
    params, state = _compiled()(params, state)
    assert first.is_deleted()
    h.assert_close((params, state), _traced_run(1))


@pytest.mark.parametrize("at", [1, 3, 6])
def test_resumes_from_the_count_of_the_state(at):
    """A state from elsewhere in the middle of another training: its own count decides."""
    _run(_compiled(), *_start(), 2)
    saved = jax.tree.map(jnp.copy, _traced_run(at))
    h.assert_close(_run(_compiled(), *saved, 9 - at), _traced_run(9))
    assert _compiled().count == 9


def test_two_trainings_may_take_turns():
    one, other = _run(_compiled(), *_start(), 3), _start()
    for _ in range(3):
        one, other = _compiled()(*one), _compiled()(*other)
    h.assert_close(one, _traced_run(6))
    h.assert_close(other, _traced_run(3))


def test_the_count_is_read_only_where_a_state_is_new(monkeypatch):
    """Reading waits for the device; a step that follows its predecessor must not."""
    from kfac_optax.engine import compiled

    reads = []
    read = compiled._read
    monkeypatch.setattr(compiled, "_read", lambda counts: reads.append(1) or read(counts))
    params, state = _run(_compiled(), *_start(), 6)
    assert len(reads) == 2  # before and after the first
    _run(_compiled(), params, jax.tree.map(jnp.copy, state), 2)
    assert len(reads) == 4


def test_any_container_and_keyword():
    def step(training, *, rate, **due):
        params, state = _train_step(training["params"], training["state"], **due)
        return {"params": params, "state": state}, rate

    params, state = _start()
    compiled = ko.compile_step(step, ko.HostSchedule(**PERIODS), donate_argnums=0)
    training = {"params": params, "state": state}
    for _ in range(2):
        training, rate = compiled(training, rate=0.5)
    assert float(rate) == 0.5
    h.assert_close((training["params"], training["state"]), _traced_run(2))


def _keeps_the_state(params, state, **due):
    return _train_step(params, state, **due)[0], state


def _without_state(params, **due):
    return params


def _two_states(params, states, **due):
    new = [_train_step(params, state, **due)[1] for state in states]
    return params, new


def _different_counts():
    params, state = _start()
    return params, [state, optax.tree.set(state, kfac_count=jnp.int32(1))]


def _call(function, *args):
    return ko.compile_step(function, ko.HostSchedule(**PERIODS))(*args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _call(jax.jit(_train_step)), TypeError, "compiled already.*Leave jax.jit out"),
        (lambda: ko.compile_step(_train_step, 10), TypeError, "schedule is 10"),
        (
            lambda: _call(lambda params, state, measure: state),
            TypeError,
            r"does not take refresh.*\*\*due",
        ),
        (lambda: _call(_without_state, 1.0), ValueError, "arguments without a count of steps"),
        (
            lambda: _call(lambda params, state, **due: params, *_start()),
            ValueError,
            "results without a count",
        ),
        (lambda: _call(_keeps_the_state, *_start()), ValueError, "0 before the first step and 0"),
        (lambda: _call(_two_states, *_different_counts()), ValueError, r"different counts, \[0, 1"),
        (lambda: jax.eval_shape(_compiled(), *_start()), TypeError, "traced arguments.*outside"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_schedule_of_adaptive_presets():
    """Left out, the periods are those of the presets: statistics and inverses fall on the steps
    that `kfac_adaptive` finds by itself.
    """
    schedule = ko.HostSchedule(adapt_every=5)
    due = [schedule(step) for step in range(101)]
    assert [i for i, d in enumerate(due) if d["measure"]] == [*range(0, 101, 5)]
    assert [i for i, d in enumerate(due) if d["refresh"]] == [0, 5, 10, *range(15, 101, 15)]
    assert [i for i, d in enumerate(due) if d["adapt"]] == [*range(4, 101, 5)]
    plain = ko.HostSchedule()
    assert [i for i in range(101) if plain(i)["measure"]] == [*range(0, 101, 10)]
    assert [i for i in range(301) if plain(i)["refresh"]] == [*range(0, 100, 10), 100, 200, 300]


def test_adaptive_presets():
    problem = h.plain_problem()
    periods = dict(curvature_every=2, inverse_every=2, adapt_every=2)
    tx = ko.kfac_adaptive(problem.layers, **periods)

    def step(params, state, **due):
        value, grads = jax.value_and_grad(problem.loss)(params)
        extra = {"curvature": problem.at(params), "value": value, "value_fn": problem.loss}
        updates, state = tx.update(grads, state, params, **extra, **due)
        return optax.apply_updates(params, updates), state

    params = h.plain_params()
    compiled = ko.compile_step(step, ko.HostSchedule(**periods))
    init = jax.jit(tx.init)
    got = _run(compiled, params, init(params), 6)
    h.assert_close(got, _run(jax.jit(step), params, init(params), 6))
