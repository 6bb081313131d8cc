"""Command line: trains every optimizer over seeds and rates, then prints tables and draws figures.

    python -m kfac_optax.experiments.compare --config=configs/deep_linear.py --config.seeds=5

Run it again to continue an interrupted sweep: finished runs with the same settings are kept. A run that
fails leaves the others alone; a directory serves one sweep at a time.
"""

from pathlib import Path

import ml_collections
from rich.console import Console

from kfac_optax.experiments import command_line, plots, results, sweep, tables


def experiment(config: ml_collections.ConfigDict, out: Path, console: Console) -> None:
    """Trains whatever is not finished yet, then reports."""
    with command_line.ends_in_words(console, "sweep"):
        runs = sweep.sweep(config, out, console)
        report(config, out, console, runs)


def report(
    config: ml_collections.ConfigDict,
    out: Path,
    console: Console,
    runs: results.Runs,
) -> None:
    """Prints the tables; writes summary.csv and the figures."""
    title, base, score = config.title, results.base_runs(config, runs), results.score(runs)
    results.write_summary(out / "summary.csv", runs, targets=config.targets)
    plots.loss(out / "loss.png", base, title=title)
    plots.scores(out / f"{score}.png", base, title=title)
    plots.over_seconds(out / "seconds.png", base, title=title)
    files = ["summary.csv", "loss.png", f"{score}.png", "seconds.png"]
    console.print(
        tables.fixed_rate(
            base, workers=config.workers, evaluate_with=config.get("evaluate_with") or "fresh"
        )
    )
    if config.tune:
        plots.tuned_loss(out / "tuned_loss.png", runs, title=title)
        plots.tuned_score(out / f"tuned_{score}.png", runs, title=title)
        files += ["tuned_loss.png", f"tuned_{score}.png"]
        console.print(tables.tuned(runs, targets=config.targets))
        if len({rate for _, rate in runs}) > 2:
            console.print(tables.every_rate(runs))
    if config.get("report_every") or config.get("budget_seconds"):
        console.print(tables.race(runs, targets=config.targets))
    console.print(f"{out}: {', '.join(files)}, runs/", soft_wrap=True)


if __name__ == "__main__":
    command_line.run(experiment)
