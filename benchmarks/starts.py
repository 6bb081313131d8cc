"""How `kfac_adaptive` finds its damping, from many starts: `python -m benchmarks.starts --data-dir DIR`.

The race of `benchmarks.to_loss` without a clock, so that other work beside changes nothing: losses
of 5,000 training images after so many steps, from a seed of its own each.
"""

import argparse
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import to_loss
from benchmarks.ratios import table
from kfac_optax.experiments import data

SHOWN = (3, 5, 10, 20, 45)  # steps


class Start(NamedTuple):
    """Losses after `0, 1, ...` steps, and what the damping did."""

    losses: list[float]
    rejected: int
    largest_damping: float


def follow(
    problem: to_loss.Problem,
    pixels: np.ndarray,
    *,
    seed: int,
    steps: int,
    batch: int = to_loss.BATCH,
) -> Start:
    """So many steps from one start."""
    params, state = problem.start(problem.adaptive, seed)
    drawn = to_loss.batches(pixels, seed, batch)
    losses, dampings = [float(problem.loss(params))], []
    for number in range(steps):
        params, state = problem.step(params, state, next(drawn), jax.random.key(number))
        losses.append(float(problem.loss(params)))
        dampings.append(float(state.model_damping))
    return Start(losses, int(state.rejected_steps), max(dampings))


def rows(found: dict[int, Start], shown: Sequence[int] = SHOWN) -> dict[str, dict[str, Any]]:
    """Every seed, and the mean and the worst of all."""
    of_seeds = {
        f"seed {seed}": {str(step): f"{start.losses[step]:.1f}" for step in shown}
        | {"rejected": start.rejected, "largest damping": f"{start.largest_damping:.3f}"}
        for seed, start in found.items()
    }
    at = {step: [start.losses[step] for start in found.values()] for step in shown}
    of_all = {
        name: {str(step): f"{summary(losses):.1f}" for step, losses in at.items()}
        for name, summary in (("mean", statistics.fmean), ("worst", max))
    }
    return of_seeds | of_all


def main(arguments: list[str] | None = None) -> dict[int, Start]:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=pathlib.Path, required=True)
    parser.add_argument("--setting", default="statistics of a part", choices=list(to_loss.SETTINGS))
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args(arguments)
    images = data.idx_files.read_images(options.data_dir).train_x
    pixels = images.reshape(len(images), -1)
    setting = to_loss.SETTINGS[options.setting]
    problem = to_loss.Problem(setting, pixels, to_loss.BATCH, to_loss.WIDTHS)
    found = {}
    for seed in range(options.seeds):
        found[seed] = follow(problem, pixels, seed=seed, steps=max(SHOWN))
        print(f"seed {seed}: {found[seed].losses[-1]:.2f}", flush=True)
    print("\n".join(table(rows(found))), flush=True)
    return found


if __name__ == "__main__":
    main()
