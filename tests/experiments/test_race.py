"""Rows within an epoch, runs that end by the clock, and what is made of runs of unequal length."""

import itertools
import math
import re
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import kfac_optax as ko
from kfac_optax.experiments import (
    clock,
    compare,
    optimizers,
    plots,
    results,
    settings,
    steps,
    sweep,
    tables,
    train,
    workers,
)
from kfac_optax.experiments.checkpoints import Store
from kfac_optax.experiments.results import Job, Run
from tests.experiments.conftest import read_config


def rows_of(trainer, config, **options):
    return list(train.run(trainer, config, rate=1e-2, seed=0, **options))


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which every call of compiled code takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(
        train, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    )


def test_rows_within_an_epoch_are_means_since_the_row_before(deep_linear, trainers):
    whole = rows_of(trainers("sgd"), deep_linear)
    deep_linear.report_every = 1
    single = rows_of(trainers("sgd"), deep_linear)
    deep_linear.report_every = 3
    rows = rows_of(trainers("sgd"), deep_linear)
    assert [row.epoch for row in whole] == [1, 2]
    assert [row.epoch for row in single] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert [row.epoch for row in rows] == [0.75, 1, 1.75, 2]
    one = np.array([row[1:3] for row in single])  # loss and accuracy of every step
    np.testing.assert_allclose([row[1:3] for row in whole], one.reshape(2, 4, 2).mean(1), rtol=1e-5)
    windows = [slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 8)]
    np.testing.assert_allclose(
        [row[1:3] for row in rows], [one[w].mean(0) for w in windows], rtol=1e-5
    )
    # the test set is evaluated in the first row and at the end of epochs
    tested = [row[3:5] for row in rows]
    assert tested[1] == tested[2] == whole[0][3:5] and tested[3] == whole[1][3:5]
    assert tested[0] != tested[1]


@pytest.mark.parametrize(("every", "count"), [(0, 3), (1, 8), (3, 4)])
def test_evaluations_come_as_often_as_asked(deep_linear, trainers, every, count):
    calls = []

    def evaluate(*_):
        calls.append(1)
        return np.array([len(calls), 0.0])

    deep_linear.update(report_every=1, evaluate_every=every)
    rows = rows_of(trainers("sgd")._replace(evaluate=evaluate), deep_linear)
    assert len(rows) == 8 and len(calls) == count
    assert rows[-1].test_loss == count


ENDS = [(1, 3.0, 3, 0.75), (2, 3.0, 2, 1), (0, 5.0, 2, 2), (1, 99.0, 8, 2)]


@pytest.mark.parametrize(("every", "budget", "rows", "epoch"), ENDS)
def test_a_run_ends_with_the_row_that_spends_the_budget(
    deep_linear, trainers, ticking, every, budget, rows, epoch
):
    deep_linear.update(report_every=every, budget_seconds=budget)
    got = rows_of(trainers("sgd")._replace(steps_per_call=1), deep_linear)
    assert (len(got), got[-1].epoch) == (rows, epoch)
    assert [row.seconds for row in got] == [float(every or 4)] * rows
    assert rows < 2 or got[-1].test_loss != got[-2].test_loss  # the last row is evaluated


def test_an_interrupted_window_is_continued(deep_linear, trainers, tmp_path):
    deep_linear.report_every = 3
    trainer = trainers("sgd")._replace(steps_per_call=1)
    whole = rows_of(trainer, deep_linear)
    for last in range(1, 8):
        store = Store(tmp_path / f"{last}.npz", {}, epochs=0, seconds=1e-9)
        calls = []

        def stop(epochs, calls=calls, last=last):
            calls.append(epochs)
            if len(calls) == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rows_of(trainer, deep_linear, store=store, progress=stop)
        done = []
        resumed = rows_of(trainer, deep_linear, store=store, progress=done.append)
        assert sum(done) == 2
        assert [row[:-1] for row in resumed] == [row[:-1] for row in whole]


def test_entries_that_are_off_leave_earlier_runs_valid(deep_linear):
    job = Job("sgd", 1e-3, 0)
    before = results.run_settings(deep_linear, job)
    assert "report_every" not in before and "tune_seeds" not in before
    deep_linear.budget_seconds = 2.0
    assert results.run_settings(deep_linear, job)["budget_seconds"] == 2.0


def make_run(seconds, loss) -> Run:
    n = len(loss)
    columns = {
        "epoch": np.arange(1, n + 1) / 4,
        "train_loss": np.array(loss),
        "seconds": np.array(seconds),
    }
    columns |= {name: np.linspace(0.5, 0.9, n) for name in ("train_accuracy", "test_accuracy")}
    return Run(not math.isfinite(loss[-1]), 20, {**columns, "test_loss": np.array(loss)})


@pytest.fixture
def unequal():
    """Runs of three, four and two rows; the second optimizer's only kept run has a single row."""
    slow, fast = (
        make_run([1.0, 1.0, 1.0], [3.0, 2.0, 1.0]),
        make_run([0.5] * 4, [4.0, 3.0, 2.0, 1.0]),
    )
    return {
        ("sgd", 0.1): [slow, fast, make_run([1.0, 1.0], [9.0, math.nan])],
        ("adam", 0.1): [make_run([2.5], [1.5])],
    }


def test_curves_lie_on_a_common_grid_of_seconds(unequal):
    slow, fast = unequal["sgd", 0.1][:2]
    grid, values = clock.curves([slow, fast], "train_loss")
    np.testing.assert_allclose(grid, [1.0, 4 / 3, 5 / 3, 2.0])
    np.testing.assert_allclose(values, [4 - grid, 5 - 2 * grid])
    epochs, values = clock.by_epoch([slow, fast], "train_loss")
    np.testing.assert_allclose(epochs, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(values, [[3, 2, 1], [4, 3, 2]])
    single = unequal["adam", 0.1]
    assert [part.tolist() for part in clock.curves(single, "train_loss")] == [[2.5], [[1.5]]]
    assert clock.common(unequal) == 2.0
    np.testing.assert_allclose(
        clock.at(unequal["sgd", 0.1], "train_loss", seconds=1.75), [2.25, 1.5]
    )


def rendered(table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_race_is_told_in_seconds_and_steps(unequal):
    unequal["adam", 0.01] = [make_run([1.0], [5.0])]
    text = rendered(tables.race(unequal, targets=(2.0, 0.5)))
    assert "train loss at 2 s" in text and "1 to 3 seeds" in text
    line, steps_line = (
        row.split() for row in text.splitlines() if "SGD" in row or "steps (2/3)" in row
    )
    assert line[:2] == ["SGD", "0.1"]
    assert "1.75 ± 3.18 s" in text and "- (0/3)" in text  # 2.0 s and 1.5 s, after 10 and 15 steps
    assert steps_line[:3] == ["12", "±", "32"]
    assert "1.5000 ± 6.3531" in text  # 2.0 and 1.0 after two seconds
    adam = next(row for row in text.splitlines() if "Adam" in row)
    assert "0.1*" in adam and "500.00" in adam  # the largest rate tried; 5 steps in 2.5 s
    np.testing.assert_allclose(results.ms_per_step(unequal["sgd", 0.1]), [200.0, 100.0, 200.0])


def test_a_table_too_wide_for_its_terminal_loses_nothing(unequal):
    targets = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    shown = []
    for width in (60, 400):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(tables.race(unequal, targets=targets))
        shown.append(capture.get())
    narrow, wide = shown
    assert "…" not in narrow
    for name in {name for name, _ in unequal}:
        assert optimizers.OPTIMIZERS[name].label in narrow
    # every character of the wide one, wherever it has gone
    assert Counter(re.sub(r"[\s─]", "", narrow)) == Counter(re.sub(r"[\s─]", "", wide))


def test_figures_take_runs_of_unequal_length(tmp_path, unequal):
    for draw in (plots.loss, plots.scores, plots.over_seconds, plots.tuned_loss):
        draw(tmp_path / f"{draw.__name__}.png", unequal, title="title")
    assert len(list(tmp_path.glob("*.png"))) == 4


def own_rate(monkeypatch):
    tx = optimizers.OPTIMIZERS["sgd"]._replace(label="own rate", adaptive=True)
    monkeypatch.setitem(optimizers.OPTIMIZERS, "own", tx)


@pytest.fixture
def recorded(monkeypatch):
    """Runs that are written instead of trained; with later seeds the better rate looks worse."""
    made = []

    def record(config, out, jobs, receive):
        for job in jobs:
            made.append(job.name)
            loss = job.rate * (1 if job.seed < 2 else 100)
            row = train.Metrics(1.0, loss, 0.5, loss, 0.5, 0.1)
            details = {"steps_per_epoch": 4}
            results.record(
                out / "runs" / job.name, results.run_settings(config, job), [row], details
            )

    monkeypatch.setattr(workers, "train_all", record)
    return made


def first_of(rate: str) -> list[str]:
    return [f"sgd-lr{rate}-seed{seed}" for seed in range(2)]


def test_only_the_best_rate_gets_the_remaining_seeds(deep_linear, recorded, tmp_path, monkeypatch):
    own_rate(monkeypatch)
    deep_linear.update(
        optimizers=("sgd", "own"), seeds=4, tune_seeds=2, grid=(1e-1, 1e-2), learning_rate=1e-1
    )
    runs = sweep.sweep(deep_linear, tmp_path, Console(quiet=True))
    given = [f"{name}-lr0.1-seed{seed}" for name in ("sgd", "own") for seed in range(4)]
    other = [f"sgd-lr0.01-seed{seed}" for seed in range(2)]
    later = [f"sgd-lr0.01-seed{seed}" for seed in (2, 3)]
    assert recorded == given + other + later
    assert {key: len(group) for key, group in runs.items()} == {
        ("sgd", 0.1): 4,
        ("own", 0.1): 4,
        ("sgd", 0.01): 4,
    }
    assert results.best_rate(runs, "sgd") == 0.01  # by the seeds that both rates have

    recorded.clear()
    (tmp_path / "runs" / "sgd-lr0.01-seed3" / "run.json").unlink()  # as an interrupt leaves it
    sweep.sweep(deep_linear, tmp_path, Console(quiet=True))
    assert recorded == ["sgd-lr0.01-seed3"]

    recorded.clear()  # the given rate is the best: it has all its seeds already
    deep_linear.learning_rate = 1e-2
    again = sweep.sweep(deep_linear, tmp_path / "given", Console(quiet=True))
    assert recorded == [
        *(f"{name}-lr0.01-seed{i}" for name in ("sgd", "own") for i in range(4)),
        *first_of("0.1"),
    ]
    assert {key: len(group) for key, group in again.items()} == {
        ("sgd", 0.01): 4,
        ("own", 0.01): 4,
        ("sgd", 0.1): 2,
    }

    deep_linear.learning_rate = 1e-1
    console = Console(width=150)
    deep_linear.report_every = 1
    with console.capture() as capture:
        compare.report(deep_linear, tmp_path, console, runs)
    text = capture.get()
    assert "best learning rate of 0.1, 0.01" in text and "by training seconds" in text
    assert len(re.findall(r"own rate +own ", text)) == 2  # the column of the rate


def test_more_seeds_to_tune_with_than_there_are_mean_all(deep_linear):
    deep_linear.update(optimizers=("sgd",), seeds=1, tune_seeds=2)
    assert sweep.plan(deep_linear) == [Job("sgd", 1e-3, 0), Job("sgd", 1e-1, 0)]


def test_an_optimizer_may_have_a_grid_of_its_own(deep_linear, monkeypatch):
    own_rate(monkeypatch)
    with deep_linear.unlocked():
        deep_linear.per_optimizer = {
            "adam": {"grid": (3e-4,), "learning_rate": 1e-2},
            "own": {"learning_rate": 1.0},
        }
    deep_linear.update(optimizers=("sgd", "adam", "own"), seeds=1)
    assert {(job.optimizer, job.rate) for job in sweep.plan(deep_linear)} == {
        ("sgd", 1e-3),
        ("sgd", 1e-1),
        ("adam", 1e-2),
        ("adam", 3e-4),
        ("own", 1.0),
    }
    assert settings.rates(deep_linear, "adam", tuned=True) == [1e-2, 3e-4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"report_every": -1},
            "config.report_every: got -1, expected a positive number, or 0 for none",
        ),
        ({"evaluate_every": -1}, "config.evaluate_every: got -1"),
        ({"budget_seconds": -1.0}, "config.budget_seconds: got -1.0"),
        ({"evaluate_with": "now"}, "config.evaluate_with: got 'now', expected one of"),
        ({"tune_seeds": -1}, "config.tune_seeds: got -1"),
    ],
)
def test_bad_settings_of_a_race_are_refused(deep_linear, change, message):
    deep_linear.update(change)
    with pytest.raises(ValueError, match=message):
        sweep.validate(deep_linear)


def test_an_update_can_get_value_gradient_and_loss_function(deep_linear):
    deep_linear.model.depth = 0
    dataset, key = train.start(deep_linear, seed=0)
    problem = steps.problem(deep_linear, "sgd", dataset)

    def extra(params, model_state, x, key, *, value, value_fn, grad, targets, **due):
        del targets
        shifted = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grad)
        return {
            "seen": {"value": value, "again": value_fn(params), "less": value_fn(shifted), **due}
        }

    def update(grads, state, params=None, *, seen):
        return grads, seen

    tx = optax.GradientTransformationExtraArgs(lambda params: {}, update)
    problem = problem._replace(method=optimizers.Method(lambda rate: tx, extra))

    @jax.jit
    def step(key):
        state = steps.init(problem, 0.1, key, dataset)
        epoch = steps.shuffle(problem, state.key, len(dataset.train_x))
        return steps.train_one(
            problem, 0.1, state, steps.no_reports(problem), dataset, epoch, 0, adapt=jnp.int32(7)
        )

    state, reports = step(key)
    seen = state.opt_state
    assert (
        float(seen["value"])
        == pytest.approx(float(seen["again"]))
        == pytest.approx(float(reports[0, 0]))
    )
    assert float(seen["less"]) < float(seen["value"])
    assert int(seen["adapt"]) == 7


def test_the_host_decides_warm_up_parts_and_further_flags(digits):
    options = digits.kfac.to_dict() | {
        "stagger": 2,
        "inverse_every": {"regular": 4, "warmup_steps": 2},
    }
    digits.kfac = options
    dataset, _ = train.start(digits, seed=0)
    method = steps.problem(digits, "kfac", dataset).method
    assert [method.due(step)["refresh"] for step in range(7)] == [
        True,
        True,
        (1,),
        False,
        (0,),
        False,
        (1,),
    ]
    got = method.extra(
        None,
        None,
        None,
        jax.random.key(0),
        value=1.0,
        value_fn=None,
        grad=None,
        measure=False,
        refresh=(1,),
        adapt=True,
    )
    # the bound takes a product in every step
    assert got.pop("curvature") is not None
    assert got == {"measure": False, "refresh": (1,), "adapt": True}


def test_the_python_loop_takes_the_step_that_is_due(digits, monkeypatch):
    """Also where a call begins within an epoch, and for every part of the inverses."""
    due = ko.HostSchedule(curvature_every=2, inverse_every=4, stagger=2)
    kinds = [(True, True), (False, False), (True, (1,)), (True, (0,))]

    def update(updates, state, params=None, *, kind):
        log = state["log"].at[state["kfac_count"]].set(kind)
        return jax.tree.map(jnp.zeros_like, updates), {
            "kfac_count": state["kfac_count"] + 1,
            "log": log,
        }

    def extra(*_, measure, refresh, **__):
        return {"kind": kinds.index((measure, refresh))}

    init = lambda params: {"kfac_count": jnp.int32(0), "log": jnp.full(8, -1)}
    method = optimizers.Method(
        lambda rate: optax.GradientTransformationExtraArgs(init, update), extra, due
    )
    monkeypatch.setattr(optimizers, "make", lambda *_, **__: method)
    digits.epochs = 2
    with digits.unlocked():
        digits.python_loop = True
    trainer = train.prepare(digits, "sgd")
    dataset, key = train.start(digits, seed=0)
    state, reports = trainer.init(0.1, key, dataset), jnp.zeros((trainer.steps, 2))
    epoch = trainer.shuffle(state.key)
    for begin, end in ((0, 3), (3, 4), (0, 4)):
        state, reports = trainer.train(jnp.float32(0.1), state, reports, dataset, epoch, begin, end)
    assert state.opt_state["log"].tolist() == [0, 1, 2, 1, 3, 1, 2, 1]


def test_the_rate_of_an_adaptive_optimizer_is_its_own(unequal):
    found = {("kfac_adaptive", 0.1): unequal["sgd", 0.1][:2]}
    assert "Every optimizer at the rate it finds" in rendered(tables.tuned(found, targets=()))
    assert "at the rate it finds" in rendered(tables.fixed_rate(found, workers=1))


def test_adaptive_options_matter_to_adaptive_optimizers_only(deep_linear):
    def settings_of(name):
        return results.run_settings(deep_linear, Job(name, 0.1, 0))

    before = settings_of("kfac"), settings_of("kfac_adaptive")
    deep_linear.adaptive = {"adapt_every": 2}
    assert settings_of("kfac") == before[0]
    assert settings_of("kfac_adaptive") != before[1]


@pytest.fixture(scope="module")
def adaptive_problem():
    config = read_config("digits")
    config.update(weight_decay=0.5, batch_size=8)
    config.model.widths = (3,)
    config.adaptive = {"curvature_every": 2, "inverse_every": 4, "adapt_every": 3}
    dataset, _ = train.start(config, seed=0)
    return config, steps.problem(config, "kfac_adaptive", dataset)


def test_what_is_due_of_an_adaptive_optimizer_is_decided_on_the_host(adaptive_problem):
    due = adaptive_problem[1].method.due
    assert due(0) == {"measure": True, "refresh": True, "adapt": False}
    assert due(5) == {"measure": False, "refresh": False, "adapt": True}


def test_the_objective_of_an_adaptive_optimizer_contains_the_weight_decay(adaptive_problem):
    params, x = {"w": jnp.array([1.0, 2.0])}, jnp.zeros(1)

    def value_fn(params):
        return jnp.sum(params["w"])

    # the curvature is lazy: nothing of this model is run
    extra = adaptive_problem[1].method.extra(
        params,
        {},
        x,
        jax.random.key(0),
        value=value_fn(params),
        value_fn=value_fn,
        grad=params,
        adapt=True,
    )
    assert extra["value"] == extra["value_fn"](params) == 3 + 0.5 / 2 * 5
    assert extra["adapt"] is True and extra["curvature"] is not None
