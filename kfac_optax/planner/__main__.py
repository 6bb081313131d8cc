"""`python -m kfac_optax.planner`: a table of what strategies cost on how many devices.

    python -m kfac_optax.planner --model bert_large --devices 8 64 512
    python -m kfac_optax.planner --layers layers.json
    python -m kfac_optax.planner --pipeline gpipe 1f1b --stages 8 --microbatches 8 16

`layers.json` is a list of `[copies, p, q]`, the bias row counted in `p`. With `--pipeline` it is what
the bubbles of a pipeline of equal stages hold, in units of one forward pass.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from kfac_optax.planner.bubbles import bubble_table
from kfac_optax.planner.formulas import Costs, Shape, costs
from kfac_optax.planner.models import MODELS
from kfac_optax.planner.pipeline import ORDERS, Stage

HEADER = (
    "devices strategy memory/GiB statistics/MiB refresh/MiB step/MiB mean/MiB work/TFLOP balance"
)
# arguments of the two tables, each with its default
STRATEGY: dict[str, Any] = {
    "model": list(MODELS),
    "layers": None,
    "devices": [8, 64, 1024],
    "curvature_every": 10,
    "inverse_every": 100,
    "packed": False,
    "statistics_bits": None,
    "flops_per_byte": 0.0,
}
PIPELINE: dict[str, Any] = {
    "stages": 8,
    "microbatches": [8, 16],
    "times": [1.0, 2.0, 1.0, 6.0, 0.5],
    "layers_of_stage": 3,
}
ROW = "{:>7}  {:<15} {:>10} {:>14} {:>11} {:>8} {:>8} {:>10} {:>7}"


def strategies(devices: int) -> dict[str, dict[str, Any]]:
    """Arguments of `costs` to compare, by name; in between, groups of about the root of `W`."""
    # the largest divisor of W that is at most its root
    workers = max(m for m in range(1, devices + 1) if devices % m == 0 and m * m <= devices)
    found: dict[str, dict[str, Any]] = {
        "no placement": {"worker_fraction": None},
        "all keep all": {"worker_fraction": 1.0},
        "one keeps each": {"worker_fraction": 1 / devices},
        "one gets sums": {"worker_fraction": 1 / devices, "statistics": "scattered"},
        "one measures": {"worker_fraction": 1 / devices, "statistics": "local"},
    }
    if 1 < workers < devices:
        # neither of the two extremes
        found[f"{workers} keep each"] = {"worker_fraction": workers / devices}
    return found


def table(
    shapes: Sequence[Shape],
    devices: Sequence[int],
    curvature_every: int,
    inverse_every: int,
    packed: bool = False,
    flops_per_byte: float = 0.0,
    statistics_bits: int | None = None,
) -> str:
    """Lines of the table, one for each number of devices and strategy.

    >>> print(table([Shape(4, 1024, 1024)], [4], 10, 100).splitlines()[3][:60])
          4  one keeps each        0.04         48.0         0.0
    """
    lines: list[str] = [ROW.format(*HEADER.split())]
    for count in devices:
        for name, words in strategies(count).items():
            # who makes an inverse is a question where inverses are sent
            sends = words["worker_fraction"] is not None and "statistics" not in words
            found = costs(
                shapes,
                count,
                packed=packed,
                flops_per_byte=flops_per_byte if sends else 0.0,
                statistics_bits=statistics_bits if sends else None,
                **words,
            )
            mean = found.per_step(curvature_every, inverse_every)
            lines.append(ROW.format(count, name, *_cells(found, mean)))
    return "\n".join(lines)


def _cells(found: Costs, mean: float) -> list[str]:
    # bytes of one device: at a statistic, at a refresh, in a step, on average
    sent = [found.statistics, found.refresh, found.step, mean]
    return [
        f"{found.memory / 2**30:.2f}",
        *(f"{x / 2**20:.1f}" for x in sent),
        f"{found.work / 1e12:.3f}",
        f"{found.balance:.2f}",
    ]


def read_layers(path: str) -> list[Shape]:
    """Shapes from a JSON file.

    Raises:
      ValueError: it holds something else.
    """
    rows = json.loads(pathlib.Path(path).read_text())
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"planner: {path} holds {rows!r}; expected a list of [copies, p, q].")
    for row in rows:
        good = isinstance(row, list) and len(row) == 3
        # True is an int as well
        if not good or any(type(n) is not int or n < 1 for n in row):
            raise ValueError(
                f"planner: {path} has the row {row!r}; expected [copies, p, q], three whole "
                "numbers of at least 1."
            )
    return [Shape(*row) for row in rows]


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return int(text)


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", nargs="+", choices=ORDERS, help="fill a pipeline's bubbles")
    parser.add_argument("--stages", type=_whole)
    parser.add_argument("--microbatches", nargs="+", type=_whole)
    parser.add_argument(
        "--times",
        nargs=5,
        type=float,
        metavar=("F", "B", "C", "I", "P"),
        help="of a stage: forward, backward and curvature of a microbatch, inversion, precondition",
    )
    parser.add_argument("--layers-of-stage", type=_whole, help="pieces of C and I")


def _pipelines(given: argparse.Namespace) -> str:
    """The table of pipelines of equal stages."""
    forward, backward, curvature, inversion, precondition = given.times
    layers = given.layers_of_stage
    # a layer's share is not divided any further
    shares = (curvature / layers,) * layers, (inversion / layers,) * layers
    stage = Stage(forward, backward, *shares, precondition)
    return bubble_table([stage] * given.stages, given.microbatches, given.pipeline)


def _add_strategies(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=MODELS)
    parser.add_argument("--layers", help="a JSON file of [copies, p, q], in place of --model")
    parser.add_argument("--devices", nargs="+", type=_whole)
    parser.add_argument("--curvature-every", type=_whole)
    parser.add_argument("--inverse-every", type=_whole)
    # store_const: not given is None, as of all others
    parser.add_argument(
        "--packed", action="store_const", const=True, help="send factors without double entries"
    )
    parser.add_argument(
        "--statistics-bits", type=_whole, help="of a number of a factor that is sent"
    )
    parser.add_argument(
        "--flops-per-byte",
        type=float,
        help="operations in the time of sending a byte: what is sooner made is not sent",
    )


def _read(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with a default for each that is missing; what would have no effect is
    refused.
    """
    given = parser.parse_args(arguments)
    # what belongs to the other table, and what says the same thing twice
    void = {"--pipeline": STRATEGY} if given.pipeline else {"no --pipeline": PIPELINE}
    if given.layers is not None:
        void["--layers"] = {"model": None}
    if given.statistics_bits is not None:
        void["--statistics-bits"] = {"packed": None}
    for beside, words in void.items():
        for word in words:
            if getattr(given, word) is not None:
                flag = "--" + word.replace("_", "-")
                parser.error(f"got {flag}, which has no effect beside {beside}; leave it out")
    # only now: what was not given had to be known as such
    for word, default in (STRATEGY | PIPELINE).items():
        if getattr(given, word) is None:
            setattr(given, word, default)
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser("kfac_optax.planner", description="K-FAC on many devices.")
    _add_strategies(parser)
    _add_pipeline(parser)
    given = _read(parser, arguments)
    if given.pipeline:
        print(_pipelines(given))
        return
    # known networks, or the one of a file
    named = {name: MODELS[name]() for name in given.model}
    if given.layers is not None:
        named = {given.layers: read_layers(given.layers)}
    for name, shapes in named.items():
        print(name)
        periods = given.curvature_every, given.inverse_every
        sent = given.packed, given.flops_per_byte, given.statistics_bits
        print(table(shapes, given.devices, *periods, *sent))


if __name__ == "__main__":
    main()
