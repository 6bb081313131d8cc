"""Draws what the bubbles of BERT-Large's pipeline hold, a row for each stage:
`python -m benchmarks.pipeline --out docs/figures/pipeline.png`.

Times follow from counts of operations (`kfac_optax.planner.stage_of`), nothing is measured.
"""

import argparse
from collections.abc import Sequence

from kfac_optax.planner import Filled, Shape, Stage, Work, fill, stage_of

STAGES, MICROBATCHES, ROWS = 8, 8, 4096
# three of 24 layers on a stage: four projections and two of the MLP each
LAYERS = (Shape(12, 1025, 1024), Shape(3, 1025, 4096), Shape(3, 4097, 1024))
COLORS = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "precondition": "#999999",
    "curvature": "#E69F00",
    "inversion": "#D55E00",
}


def stages() -> list[Stage]:
    """Equal stages, in units of one forward pass."""
    unit = stage_of(LAYERS, ROWS).forward
    return [stage_of(LAYERS, ROWS, unit)] * STAGES


def draw(path: str, orders: Sequence[str] = ("gpipe", "1f1b")) -> None:
    """A panel for each order, the steps of one refresh in it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = {order: fill(stages(), MICROBATCHES, order) for order in orders}
    figure, panels = plt.subplots(
        len(orders), 1, figsize=(9, 2.6 * len(orders)), layout="constrained", sharex=True
    )
    for axes, (order, filled) in zip(panels, found.items(), strict=True):
        for work in filled.works:
            _bar(axes, work)
        for k in range(1, filled.period):
            axes.axvline(k * filled.step_time, color="black", linewidth=0.6, linestyle=":")
        axes.set_title(_title(order, filled), fontsize=9, loc="left")
        axes.set_ylabel("stage")
        axes.set_yticks(range(STAGES))
        axes.invert_yaxis()
    panels[-1].set_xlabel("time / one forward pass of a microbatch")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, list(COLORS), loc="outside lower center", ncols=len(COLORS), fontsize=8)
    figure.savefig(path, dpi=130)


def _bar(axes, work: Work) -> None:
    axes.barh(
        work.stage,
        work.end - work.start,
        left=work.start,
        height=0.8,
        color=COLORS[work.kind],
        edgecolor="white",
        linewidth=0.15,
    )


def _title(order: str, filled: Filled) -> str:
    return (
        f"{order}: {100 * filled.before:.0f} % of the time used, {100 * filled.after:.0f} % with "
        f"bubbles filled; a refresh in {filled.period} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="docs/figures/pipeline.png")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
