"""Everything about an accelerator in one run: `python -m benchmarks.accelerator`."""

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import parts
from benchmarks.accelerator import steps
from benchmarks.accelerator.accuracy import accuracy, model_precision
from benchmarks.accelerator.agreement import agreement
from benchmarks.accelerator.factorisations import factorisations
from benchmarks.accelerator.training import compile_cost, donation, training

# donation first: peaks of memory are those of the process so far
PARTS: dict[str, parts.Part] = {
    "donation": donation,
    "agreement": agreement,
    "precision": model_precision,
    "accuracy": accuracy,
    "autoencoder": functools.partial(training, steps.autoencoder),
    "factorisations": factorisations,
    "stack": functools.partial(training, steps.stack),
    "resnet20": functools.partial(training, steps.resnet20),
    "compile": compile_cost,
}


def _only(part: parts.Part, names: tuple[str, ...]) -> parts.Part:
    """A part with these optimizers, if it is one of training steps."""
    trains = isinstance(part, functools.partial) and part.func is training
    return functools.partial(part, only=names) if trains else part


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="names, with commas between")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("accelerator.json"))
    parser.add_argument("--limit", type=float, default=540, help="seconds; the rest is left out")
    known = ", ".join(steps.OPTIMIZERS)
    parser.add_argument(
        "--optimizers", help=f"of the parts with training steps, with slashes between: {known}"
    )
    parser.add_argument("--small", action="store_true", help="dry run with tiny sizes")
    options = parser.parse_args(arguments)
    chosen = parts.chosen(parser, options.parts, PARTS)
    if options.optimizers:
        names = tuple(options.optimizers.split("/"))
        chosen = {name: _only(part, names) for name, part in chosen.items()}
    command = parts.command("benchmarks.accelerator", parser, options)
    return parts.run(
        chosen, command=command, small=options.small, out=options.out, limit=options.limit
    )


if __name__ == "__main__":
    main(sys.argv[1:])
