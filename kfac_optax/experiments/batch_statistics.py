"""Batch statistics for the weights as they are, in place of running averages over weights that have
moved.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

COLLECTION = "batch_stats"
CHOICES = ("fresh", "running")

# running averages before a training pass over a batch to those after it
_Run = Callable[[Any], Any]


def check(choice: str) -> None:
    """Raises a `ValueError` for an unknown `config.evaluate_with`."""
    if choice not in CHOICES:
        raise ValueError(f"config.evaluate_with: got {choice!r}, expected one of {list(CHOICES)}")


def momentum(run: _Run, like: Any) -> Any:
    """The factor `m` of `new = m old + (1 - m) b`, of every entry: `(new(c) - new(0)) / c`.

    `c = 1 + |new(0)|` keeps the difference free of cancellation, however large the statistic `b`
    is.

    Args:
        run: running averages to those after a training pass over some batch.
        like: running averages; only shapes and types matter.
    """
    zero = jax.tree.map(jnp.zeros_like, like)
    base = run(zero)
    scale = jax.tree.map(lambda new: 1 + jnp.abs(new), base)
    return jax.tree.map(lambda new, low, c: (new - low) / c, run(scale), base, scale)


def mean_over(runs: Iterable[_Run], like: Any, m: Any) -> Any:
    """The mean over batches of their statistics `b = new(0) / (1 - m)`.

    Args:
        runs: for each batch, running averages to those after a training pass over it.
        like: running averages; only shapes and types matter.
        m: from `momentum`.
    """
    zero = jax.tree.map(jnp.zeros_like, like)
    found = [jax.tree.map(lambda new, m: new / (1 - m), run(zero), m) for run in runs]
    return jax.tree.map(lambda *parts: sum(parts) / len(parts), *found)
