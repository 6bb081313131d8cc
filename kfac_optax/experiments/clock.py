"""Runs compared at equal training seconds, although their rows lie at different ones."""

from collections.abc import Sequence

import numpy as np

from kfac_optax.experiments.results import Run, Runs

_POINTS = 400  # of a curve


def elapsed(run: Run) -> np.ndarray:
    """Training seconds up to each row."""
    return np.cumsum(run.history["seconds"])


def curves(runs: Sequence[Run], column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of several runs on one grid of seconds: grid `[n]` and values `[runs, n]`,
    interpolated linearly.

    The grid covers the seconds that every run has rows for. Where there are none (runs of a single
    row, say) it is one point with the last values, at the mean of their seconds.
    """
    times = [elapsed(run) for run in runs]
    first, last = max(t[0] for t in times), min(t[-1] for t in times)
    if first >= last:
        return np.array([np.mean([t[-1] for t in times])]), np.array(
            [[run.history[column][-1]] for run in runs]
        )
    grid = np.linspace(first, last, min(_POINTS, max(map(len, times))))
    return grid, np.array(
        [np.interp(grid, t, run.history[column]) for t, run in zip(times, runs, strict=True)]
    )


def by_epoch(runs: Sequence[Run], column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of several runs against the epoch, as far as the shortest run goes: epochs `[n]`,
    values `[runs, n]`.
    """
    rows = min(len(run.history["epoch"]) for run in runs)
    return runs[0].history["epoch"][:rows], np.array([run.history[column][:rows] for run in runs])


def common(runs: Runs) -> float:
    """The training seconds that every run which did not diverge has reached; 0 if there is none."""
    return min(
        (float(elapsed(run)[-1]) for group in runs.values() for run in group if not run.diverged),
        default=0.0,
    )


def at(runs: Sequence[Run], column: str, *, seconds: float) -> list[float]:
    """A column after so many training seconds, in each run that did not diverge."""
    kept = [run for run in runs if not run.diverged]
    return [float(np.interp(seconds, elapsed(run), run.history[column])) for run in kept]
