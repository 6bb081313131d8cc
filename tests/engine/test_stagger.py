"""Refreshes spread over the steps of a period: the division of the matrices, and what is held from
step to step.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_optax as ko
from kfac_optax.engine.stagger import cost, divide
from tests import helpers, oracles

SIZES = (3, 4, 4, 4)  # one bucket of a single matrix pair, one of two that a part can cut
EVERY = 4
BUCKETS = st.lists(st.tuples(st.integers(1, 40), st.floats(1, 1e9)), min_size=1, max_size=8)


@functools.cache
def problem(dtype="float32"):
    params = jax.tree.map(lambda v: np.asarray(v, dtype), oracles.make_params(0, SIZES))
    estimator = ko.ggn(oracles.classifier)
    return params, estimator.layers(params, jnp.ones((2, 3)))


@functools.cache
def setup(stagger, inverse="eigh", every=EVERY, dtype="float32"):
    """A compiled step without statistics, the first state, and the host's schedule."""
    params, layers = problem(dtype)
    tx = ko.scale_by_curvature(
        layers,
        block=ko.kronecker(inverse),
        coupling=ko.coarse_correction(),
        inverse_every=every,
        stagger=stagger,
    )
    step = helpers.counted_jit(
        lambda state, refresh=None: tx.update(params, state, curvature=None, refresh=refresh),
        static_argnames="refresh",
    )
    return step, tx.init(params), ko.HostSchedule(2, every, stagger)


def drift(state, seed):
    """The state with other factors, as if statistics had been taken."""

    def change(x):
        root = np.random.default_rng(seed).normal(size=x.shape).astype(x.dtype)
        return np.asarray(x) + root @ root.swapaxes(-1, -2)

    coarse = jax.tree.map(change, state.coarse.coarse_factors)
    return state._replace(
        factors=jax.tree.map(change, state.factors),
        coarse=state.coarse._replace(coarse_factors=coarse),
    )


def changed(old, new):
    """`bucket[copy]` of everything inverses that differs, and whether the coupling's does."""
    names = set()
    for bucket, before in old.inverses.items():
        for a, b in zip(
            jax.tree.leaves(before), jax.tree.leaves(new.inverses[bucket]), strict=True
        ):
            names |= {f"{bucket}[{i}]" for i in range(len(a)) if not np.array_equal(a[i], b[i])}
    coarse = (jax.tree.leaves(s.coarse.coarse_inverse) for s in (old, new))
    return names, not all(map(np.array_equal, *coarse))


def loads(buckets, parts):
    return [
        sum((stop - start) * buckets[name][1] for name, (start, stop) in part.items())
        for part in parts
    ]


@given(BUCKETS, st.integers(1, 12))
@settings(deadline=None)
def test_the_parts_are_ranges_that_cover_every_copy_once_and_balance(sizes, count):
    buckets = {str(i): size for i, size in enumerate(sizes)}
    parts = divide(buckets, parts=count)
    assert len(parts) == count and parts[0]
    for name, (copies, _) in buckets.items():
        ranges = [part[name] for part in parts if name in part]
        assert all(start < stop for start, stop in ranges)
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(copies))
    load, largest = loads(buckets, parts), max(one for _, one in buckets.values())
    mean = sum(load) / count
    assert max(load) <= (mean + largest) * (1 + 1e-9)
    if largest <= mean / 2:
        assert max(load) <= 1.5 * mean * (1 + 1e-9)


def test_an_autoencoder_is_divided_in_balance():
    """The matrices of 784-1000-500-250-30 and back, in parts whose costs are close although all
    sizes differ.
    """
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    shapes = {f"{p + 1}x{q}": cost([(p + 1, p + 1), (q, q)]) for p, q in itertools.pairwise(widths)}
    buckets = {name: (1, one) for name, one in shapes.items()}
    for count in (2, 4):
        load = loads(buckets, divide(buckets, parts=count))
        assert max(load) <= 1.1 * sum(load) / count


def test_only_square_matrices_cost_a_factorisation():
    assert cost([(5,), (3, 2), (2, 3, 3)]) == 5 + 6 + 2 * 27


def test_each_part_is_refreshed_once_a_period_and_nothing_else_changes():
    step, state, _ = setup(2)
    _, state = step(drift(state, 0))
    seen = []
    for i in range(1, 2 * EVERY + 1):
        _, new = step(drift(state, i))
        seen.append(changed(state, new))
        assert int(new.inverse_age) == i % 2 + 1
        state = new
    names = [part for part, _ in seen]
    assert [len(part) for part in names[:4]] == [0, 1, 0, 2]
    assert [coarse for _, coarse in seen] == [False, False, False, True] * 2  # with part 0
    assert names[:4] == names[4:]
    assert len(names[1] | names[3]) == 3
    assert step.traces == 1


@pytest.mark.parametrize(("stagger", "inverse"), [(2, "eigh"), (3, "cholesky"), (5, "eigh")])
def test_after_a_period_of_constant_factors_all_is_as_if_refreshed_at_once(stagger, inverse, x64):
    """From factors that changed since step 0; more parts than matrices are possible too."""
    inverses = []
    for n in (None, stagger):
        step, state, _ = setup(n, inverse, dtype="float64")
        state = drift(step(state)[1], 0)
        for _ in range(EVERY):
            before, (_, state) = state, step(state)
        inverses.append((state.inverses, state.coarse))
        assert changed(before, state)[1]  # the coupling, with part 0, in the last step
        assert jax.tree.leaves(state.inverses)[0].dtype == jnp.float64
    helpers.assert_leaves_close(*inverses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("stagger", [2, 3])
def test_static_parts_equal_the_traced_schedule(stagger):
    step, one, schedule = setup(stagger)
    two, kinds = one, set()
    for i in range(2 * EVERY + 2):
        refresh = schedule(i)["refresh"]
        u, one = step(drift(one, i))
        v, two = step(drift(two, i), refresh=refresh)
        kinds.add(refresh)
        helpers.assert_leaves_close((u, one), (v, two), rtol=1e-4)
    assert kinds == {True, False} | {(j,) for j in range(stagger)}
    assert "cond[" not in str(
        jax.make_jaxpr(functools.partial(step.__wrapped__, refresh=(1,)))(two)
    )
    assert "cond[" in str(jax.make_jaxpr(step.__wrapped__)(two))


def test_failed_matrices_of_a_part_keep_their_inverse_and_are_counted():
    step, state, _ = setup(2, "cholesky")
    _, state = step(drift(state, 0))
    bucket = "dense_5x4_bias"
    broken = state.factors[bucket]._replace(
        outputs=state.factors[bucket].outputs - 100 * np.eye(4, dtype=np.float32)
    )
    broken = drift(state, 1)._replace(factors=state.factors | {bucket: broken})
    seen, failures = [], 0
    for part in range(2):
        _, new = step(broken, refresh=(part,))
        failures += int(new.failed_inverses)
        seen += [name for name in changed(state, new)[0] if name.startswith(bucket)]
    assert (failures, seen) == (2, [])


def test_a_state_that_was_never_refreshed_is_refreshed_at_once():
    """Whatever its count says: the first steps were taken without."""
    step, state, _ = setup(3)
    _, state = step(drift(state, 0), refresh=False)
    before, (_, state) = state, step(state)
    names, coarse = changed(before, state)
    assert len(names) == 3 and coarse
    before, (_, state) = state, step(drift(state, 1))  # in step 2 only part 2 of 3
    assert len(changed(before, state)[0]) == 1


@pytest.mark.parametrize("stagger", [None, 3])
def test_a_warm_up_is_the_same_traced_and_on_the_host(stagger):
    step, one, schedule = setup(stagger, every=ko.refresh_period(EVERY, warmup_steps=3))
    two, said = one, []
    for i in range(9):
        refresh = schedule(i)["refresh"]
        u, one = step(drift(one, i))
        v, two = step(drift(two, i), refresh=refresh)
        helpers.assert_leaves_close((u, one), (v, two), rtol=1e-4)
        said.append(refresh)
    assert said[:3] == [True] * 3  # every part, in every step of the warm-up
    rest = (
        [False, True, False, False, False, True]
        if stagger is None
        else [False, (0,), (1,), (2,), False, (0,)]
    )
    assert said[3:] == rest


@pytest.mark.parametrize("preset", [ko.kfac, ko.kfac_two_level])
def test_presets_hand_the_parts_on(preset):
    params, layers = problem()
    tx = preset(layers, learning_rate=0.1, stagger=2)
    with pytest.raises(ValueError, match="because stagger=2"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, curvature=None, refresh=(2,)), params)


def test_a_warm_up_period_keeps_the_kind_of_the_count():
    period = ko.refresh_period(50, warmup_steps=10, first=5)
    assert [period(c) for c in (0, 9, 10)] == [5, 5, 50]
    assert all(type(period(c)) is int for c in (0, np.int64(10)))
    traced = jax.jit(period)(jnp.int32(10))
    assert traced.dtype == jnp.int32 and int(traced) == 50


WRONG = [
    (lambda: setup.__wrapped__(0), ValueError, "stagger=0; expected stagger >= 1"),
    (lambda: setup.__wrapped__(1.5), TypeError, "stagger is 1.5; expected a Python int or None"),
    (lambda: setup.__wrapped__(jnp.int32(2)), TypeError, 'static_args=\\("stagger",\\)'),
    (lambda: ko.HostSchedule(stagger=-1)(1), ValueError, "HostSchedule: stagger=-1"),
    (
        lambda: ko.HostSchedule(inverse_every=lambda step: 0)(1),
        ValueError,
        "inverse_every=0; expected",
    ),
    (lambda: ko.refresh_period(0, warmup_steps=1), ValueError, "refresh_period: regular=0"),
    (lambda: ko.refresh_period(10, warmup_steps=-1), ValueError, "warmup_steps=-1"),
    (lambda: ko.refresh_period(10, warmup_steps=1, first=0), ValueError, "first=0"),
]


@pytest.mark.parametrize(("build", "error", "message"), WRONG)
def test_wrong_settings_raise(build, error, message):
    with pytest.raises(error, match=message):
        build()


REFUSED = [
    ((2,), ValueError, r"refresh=\(2,\); expected part numbers from 0 to 1, because stagger=2"),
    ((0, -1), ValueError, "expected part numbers from 0 to 1"),
    ((True,), TypeError, "expected None, True, False or a tuple of part numbers"),
    ([0], TypeError, r"refresh is \[0\]"),
    (1, TypeError, "refresh is 1"),
]


@pytest.mark.parametrize(("refresh", "error", "message"), REFUSED)
def test_wrong_parts_raise(refresh, error, message):
    step, state, _ = setup(2)
    with pytest.raises(error, match=message):
        step.__wrapped__(state, refresh=refresh)
