"""How the cost of a factor's inverse grows with the width of a layer:
`python -m benchmarks.scaling`.

For each width `d`, with rank and batch fixed: a refresh (eigendecomposition, Cholesky inverse,
random sketch, online update) and an application (dense inverse or low rank, to a `d x d` gradient
or to the rows of a batch). Prints seconds, the exponent that a line through the last points of each
curve has on log axes, where curves cross, and the ratio of eigendecomposition to online update;
writes the figure.
"""

import argparse
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks.ratios import seconds
from kfac_optax.linalg.factorize import psd_eigh, psd_inverse
from kfac_optax.linalg.online import brand_update
from kfac_optax.linalg.randomized import randomized_eigh
from kfac_optax.linalg.truncated_eigen import low_rank_solve, zero

REFRESH = ("eigendecomposition", "Cholesky inverse", "random sketch", "online update")
APPLY = ("dense inverse", "dense inverse, from rows", "low rank", "low rank, from rows")
# points of a curve that its exponent is fitted to, the widest: at small widths fixed costs rule
FITTED = 3
ENOUGH = 5.0  # seconds of repetitions


def calls(width: int, rank: int, rows: int) -> dict[str, Callable[[], None]]:
    """What is timed, by name, at one width."""
    key = jax.random.key(width)
    # columns of decaying size: a spectrum as factors have it
    y = jax.random.normal(key, (width, 2 * rank)) * 0.97 ** jnp.arange(2 * rank)
    factor, new = y @ y.T, y[:, :rows]
    low = brand_update(zero(width, rank), y, 0.0, rank=rank, keep=rank)
    gradient = jax.random.normal(key, (width, width))
    shift = jnp.float32(0.1)

    def made(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        compiled = jax.jit(function).lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))

    return {
        "eigendecomposition": made(psd_eigh, factor),
        "Cholesky inverse": made(psd_inverse, factor, shift),
        "random sketch": made(lambda x, key: randomized_eigh(x, key, rank=rank), factor, key),
        "online update": made(
            lambda low, y: brand_update(low, y, 0.95, rank=rank, keep=rank), low, new
        ),
        "dense inverse": made(lambda x, v: jnp.matmul(x, v, precision="highest"), factor, gradient),
        "dense inverse, from rows": made(
            lambda x, y: jnp.matmul(x, y, precision="highest"), factor, new
        ),
        "low rank": made(low_rank_solve, low, gradient, shift),
        "low rank, from rows": made(low_rank_solve, low, new, shift),
    }


def time_of(function: Callable[[], None]) -> float:
    """Median seconds of a few calls, of one where a call is long."""
    spent = [seconds(function)]
    while sum(spent) < ENOUGH and len(spent) < 9:
        spent.append(seconds(function))
    return statistics.median(spent[1:] or spent)


def exponent(widths: list[int], times: list[float]) -> float:
    """Slope of the last points on log axes."""
    return float(np.polyfit(np.log(widths[-FITTED:]), np.log(times[-FITTED:]), 1)[0])


def crossover(widths: list[int], slow: list[float], fast: list[float]) -> float:
    """Width from which on `fast` takes less time than `slow`, between two that were measured; NaN
    if never.
    """
    gap = np.log(slow) - np.log(fast)
    for i in range(len(gap) - 1, -1, -1):
        if gap[i] <= 0:
            if i + 1 == len(gap):
                return math.nan
            share = -gap[i] / (gap[i + 1] - gap[i])
            return float(
                np.exp(np.log(widths[i]) + share * (np.log(widths[i + 1]) - np.log(widths[i])))
            )
    return float(widths[0])


def report(widths: list[int], times: dict[str, dict[int, float]]) -> None:
    """The tables."""
    print(f"| {'seconds at width':20} | {' | '.join(map(str, widths))} | exponent |")
    print("| --- |" + " --- |" * (len(widths) + 1))
    for name, of_width in times.items():
        cells = [f"{of_width[d]:.2g}" if d in of_width else "" for d in widths]
        print(
            f"| {name} | {' | '.join(cells)} | "
            f"{exponent(list(of_width), list(of_width.values())):.2f} |"
        )
    print()
    for slow, fast in (
        *((x, "online update") for x in REFRESH[:3]),
        (REFRESH[0], REFRESH[2]),
        (REFRESH[1], REFRESH[2]),
    ):
        both = [d for d in widths if d in times[slow]]
        found = crossover(both, [times[slow][d] for d in both], [times[fast][d] for d in both])
        print(f"{fast} takes less than {slow} from width {found:.0f} on")
    last = max(times[REFRESH[0]])
    print(
        f"at width {last}: eigendecomposition / online update = "
        f"{times[REFRESH[0]][last] / times[REFRESH[3]][last]:.0f}"
    )


def widths_of(times: dict[str, dict[int, float]]) -> list[int]:
    return sorted({width for of_width in times.values() for width in of_width})


def draw(times: dict[str, dict[int, float]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, names, title in zip(
        axes, (REFRESH, APPLY), ("refresh of one factor", "application"), strict=True
    ):
        for name in names:
            widths, spent = list(times[name]), list(times[name].values())
            ax.loglog(
                widths, spent, "o-", label=f"{name}: width$^{{{exponent(widths, spent):.1f}}}$"
            )
        ax.set(title=title, xlabel="width")
        ax.set_xticks(widths_of(times), labels=widths_of(times), minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set_ylabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--eigh-up-to", type=int, default=8192, help="widest eigendecomposition")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/scaling.png"))
    options = parser.parse_args()
    times: dict[str, dict[int, float]] = {name: {} for name in (*REFRESH, *APPLY)}
    for width in track(options.widths, description="widths"):
        for name, call in calls(width, options.rank, options.rows).items():
            if name != REFRESH[0] or width <= options.eigh_up_to:
                times[name][width] = time_of(call)
    report(options.widths, times)
    draw(times, options.out)
    print(f"figure: {options.out}")


if __name__ == "__main__":
    main()
