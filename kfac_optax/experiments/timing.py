"""Honest step times: one optimizer at a time, nothing beside it, kept in `timing.json`."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from kfac_optax.experiments import results, train
from kfac_optax.experiments.results import Job, Timing, Timings


def load(config: ml_collections.ConfigDict, out: Path) -> Timings:
    """Reads the timings of those optimizers that were timed with the present settings."""
    stored = _read(out)
    return {
        name: Timing(stored[name]["ms_per_step"], stored[name]["steps_per_epoch"])
        for name in dict.fromkeys(config.optimizers)
        if name in stored and stored[name]["settings"] == _settings(config, name)
    }


def measure(
    config: ml_collections.ConfigDict, trainers: dict[str, train.Trainer], *, repeats: int = 3
) -> Timings:
    """Times training steps without evaluation.

    The optimizers take turns, so that a slow phase of the machine falls on all of them; a repeat is
    about as long as one period of the inverses, so that each holds its share of them.

    Args:
        config: the experiment.
        trainers: compiled functions by optimizer.
        repeats: number of turns.

    Returns:
        Milliseconds per step of every turn, by optimizer.
    """
    dataset, key = train.start(config, seed=0)
    rate = jnp.float32(config.learning_rate)
    states = {}
    for name, trainer in trainers.items():  # one epoch each to warm up
        states[name], _ = trainer.epoch(rate, trainer.init(rate, key, dataset), dataset)
    jax.block_until_ready(states)
    ms: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(repeats):
        for name, trainer in trainers.items():
            epochs = max(1, round(config.kfac.inverse_every / trainer.steps))
            began = time.perf_counter()
            for _ in range(epochs):
                states[name], _ = trainer.epoch(rate, states[name], dataset)
            jax.block_until_ready(states[name])
            ms[name].append(1e3 * (time.perf_counter() - began) / (epochs * trainer.steps))
    return {name: Timing(ms[name], trainer.steps) for name, trainer in trainers.items()}


def save(config: ml_collections.ConfigDict, out: Path, timings: Timings) -> None:
    """Adds timings to `timing.json`."""
    new = {
        name: {
            "settings": _settings(config, name),
            "ms_per_step": timing.ms,
            "steps_per_epoch": timing.steps,
        }
        for name, timing in timings.items()
    }
    results.write_json(out / "timing.json", {**_read(out), **new})


def _read(out: Path) -> dict[str, Any]:
    path = out / "timing.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _settings(config: ml_collections.ConfigDict, name: str) -> dict[str, Any]:
    # Neither the seed, the rate nor the length of a run changes how long one step takes.
    settings = results.run_settings(config, Job(name, config.learning_rate, 0))
    settings.pop("epochs")
    settings.pop("learning_rate")
    return settings
