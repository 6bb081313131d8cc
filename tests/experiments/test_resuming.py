import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfac_optax.experiments import models, results, train, workers
from kfac_optax.experiments.checkpoints import Position, Store
from kfac_optax.experiments.likelihoods import LIKELIHOODS
from kfac_optax.experiments.results import Job

STATE = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "half": jnp.full(3, 1.5, jnp.bfloat16),
    "key": jax.random.key(7),
    "count": jnp.int32(3),
    "nothing": (),
}


def store(path, *, epochs: int = 1, seconds: float = 0, **settings) -> Store:
    return Store(path / "checkpoint.npz", {"epochs": 3, **settings}, epochs=epochs, seconds=seconds)


def test_a_state_comes_back_with_its_types_and_position(tmp_path):
    position = Position([[1.0, 1 / 3], [2.0, 0.1]], 5, 0.7)
    store(tmp_path).write(position, STATE)
    like = STATE | {"w": jnp.zeros((2, 3)), "key": jax.random.key(0)}
    found, state = store(tmp_path).read(like)
    assert found == position
    assert state["half"].dtype == jnp.bfloat16 and state["count"].dtype == jnp.int32
    np.testing.assert_array_equal(
        jax.random.normal(state.pop("key")), jax.random.normal(STATE["key"])
    )
    jax.tree.map(
        np.testing.assert_array_equal, state, {k: v for k, v in STATE.items() if k != "key"}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]


def test_what_a_run_cannot_use_is_left_alone(tmp_path):
    assert store(tmp_path).read(STATE) is None
    store(tmp_path).write(Position(), STATE)
    assert store(tmp_path, damping=1.0).read(STATE) is None
    assert store(tmp_path).read(STATE | {"more": jnp.zeros(1)}) is None
    assert store(tmp_path).read(STATE | {"w": jnp.zeros((3, 2))}) is None
    assert store(tmp_path).read(STATE | {"count": jnp.float32(3)}) is None
    assert store(tmp_path).read(STATE) is not None
    path = tmp_path / "checkpoint.npz"
    path.write_bytes(path.read_bytes()[:-50])
    assert store(tmp_path).read(STATE) is None
    path.write_bytes(b"")
    assert store(tmp_path).read(STATE) is None
    store(tmp_path).remove()
    store(tmp_path).remove()
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    store(tmp_path).write(Position(step=1), STATE)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path).write(Position(step=2), STATE)
    assert store(tmp_path).read(STATE)[0].step == 1


def test_epochs_and_seconds_decide_when_a_checkpoint_is_due(tmp_path):
    by_epoch = store(tmp_path, epochs=2)
    rows = [[1.0], [2.0]]
    assert by_epoch.due(Position(rows))
    assert not by_epoch.due(Position(rows[:1]))
    assert not by_epoch.due(Position(rows, step=3))
    assert not store(tmp_path, epochs=0).due(Position(rows))
    assert store(tmp_path, epochs=0, seconds=1e-9).due(Position(rows, step=3))
    assert not store(tmp_path, epochs=0, seconds=1e9).due(Position(rows, step=3))


def test_a_killed_sweep_goes_on_where_it_was(deep_linear, trainers, tmp_path, monkeypatch):
    deep_linear.update(epochs=3, optimizers=("two_level",), seeds=1, tune=False)
    with deep_linear.unlocked():
        deep_linear.update(checkpoint_every=0, checkpoint_seconds=1e-9)
    trainer = trainers("two_level")._replace(steps_per_call=3)
    monkeypatch.setattr(train, "prepare", lambda config, name: trainer)
    job = Job("two_level", 1e-2, 0)
    whole = [row[:-1] for row in train.run(trainer, deep_linear, rate=job.rate, seed=job.seed)]

    events = []

    def kill(event):
        events.append(event)
        if len(events) == 4:  # the second epoch's rest is trained but not kept
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.train_all(deep_linear, tmp_path, [job], kill)
    directory = tmp_path / "runs" / job.name
    assert {path.name for path in directory.iterdir()} == {"checkpoint.npz", "metrics.csv"}

    events.clear()
    workers.train_all(deep_linear, tmp_path, [job], events.append)
    assert [event.epochs for event in events[:-1]] == [1.75, 0.25, 0.75, 0.25]
    assert sum(event.epochs for event in events) == 3
    assert {path.name for path in directory.iterdir()} == {"run.json", "metrics.csv"}
    run = results.load(directory, results.run_settings(deep_linear, job))
    final = json.loads((directory / "run.json").read_text())["final"]
    assert final["train_loss"] == whole[-1][1]
    expected = [[float(f"{value:.7g}") for value in row] for row in whole]
    np.testing.assert_array_equal(
        np.transpose([run.history[name] for name in list(run.history)[:-1]]), expected
    )


def test_steps_follow_the_schedule_and_evaluation_goes_batch_by_batch(digits):
    digits.data.test = 30
    with digits.unlocked():
        digits.schedule = {"epochs": (1,), "factors": (1.0, 0.0)}
        digits.evaluation_batch = 8  # does not divide 30
    trainer = train.prepare(digits, "sgd")
    dataset, key = train.start(digits, seed=0)
    rate = jnp.float32(1e-2)
    state, reports = trainer.init(rate, key, dataset), jnp.zeros((trainer.steps, 2))
    params = [jax.tree.map(np.array, state.params)]
    for _ in range(3):
        epoch = trainer.shuffle(state.key)
        state, reports = trainer.train(rate, state, reports, dataset, epoch, 0, trainer.steps)
        state = state._replace(key=jnp.copy(epoch.next_key))
        params.append(jax.tree.map(np.array, state.params))
    kernels = [p["Dense_0"]["kernel"] for p in params]
    assert not np.array_equal(kernels[1], kernels[0])
    np.testing.assert_array_equal(kernels[2], kernels[1])
    np.testing.assert_array_equal(kernels[3], kernels[1])

    likelihood = LIKELIHOODS["categorical"]
    logits = models.build(digits.model, outputs=10).apply(
        {"params": params[-1]}, dataset.test_x, train=False
    )
    expected = [part(logits, dataset.test_y).mean() for part in (likelihood.nll, likelihood.score)]
    np.testing.assert_allclose(trainer.evaluate(params[-1], {}, dataset), expected, rtol=1e-5)
