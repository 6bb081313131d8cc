"""Runs named measurements, prints each as it ends, and keeps a JSON file up to date.

A part is a function of `small` (sizes for a dry run) that gives its measurements one by one. A
measurement that raises is recorded with its error, and the next one follows; past the time limit
the rest is recorded as left out.
"""

import argparse
import json
import os
import pathlib
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

import kfac_optax as ko


class Case(NamedTuple):
    """One measurement: `measure()` gives its numbers by name."""

    name: str
    measure: Callable[[], dict[str, Any]]


Part = Callable[[bool], Iterable[Case]]
_LATE = {"left_out": "out of time"}
_SKIPPED = Case("(the whole part)", lambda: _LATE)


def environment(command: str) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    device = jax.devices()[0]
    return {
        "command": command,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        # what else ran when this began, in cores; unknown on Windows
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "platform_version": getattr(device.client, "platform_version", ""),
        "jax": jax.__version__,
        "kfac_optax": ko.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def chosen(parser: argparse.ArgumentParser, names: str, known: dict[str, Part]) -> dict[str, Part]:
    """The parts that the command line names, in its order."""
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"--parts: got {', '.join(unknown)}; expected some of {', '.join(known)}")
    return {name: known[name] for name in wanted}


def refuse(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    beside: str,
    names: Sequence[str],
) -> None:
    """Ends the program where a word has another value than its default beside one that makes it
    void.
    """
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"got --{name}, which has no effect beside {beside}; leave it out")


def command(program: str, parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command line that measures what this one does, wherever its files go.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--parts", default="all"), parser.add_argument("--limit", type=float)
    >>> _ = parser.add_argument("--small", action="store_true")
    >>> command("benchmarks", parser, parser.parse_args(["--limit=90"]))
    'python -m benchmarks --limit 90'
    """
    words = [f"python -m {program}"]
    if options.parts != parser.get_default("parts"):
        words.append(f"--parts {options.parts}")
    if options.limit != parser.get_default("limit"):
        words.append(f"--limit {options.limit:g}")
    if options.small:
        words.append("--small")
    return " ".join(words)


def run(
    parts: dict[str, Part],
    *,
    command: str = "",
    small: bool = False,
    out: pathlib.Path | None = None,
    limit: float = float("inf"),
) -> dict[str, Any]:
    """Runs the parts in order.

    Args:
      parts: by name.
      command: what the record says it was made with.
      small: dry run.
      out: JSON file, written anew after every measurement.
      limit: seconds from now after which no measurement is started.

    Returns:
      What is in the file: `{"environment": {...}, "parts": {part: [row, ...]}}`.
    """
    start = time.perf_counter()
    record: dict[str, Any] = {"environment": environment(command) | {"small": small}, "parts": {}}
    print(", ".join(f"{name}: {value}" for name, value in record["environment"].items()))
    for name, part in parts.items():
        rows: list[dict[str, Any]] = []
        record["parts"][name] = rows
        print(f"\n{name} (after {time.perf_counter() - start:.0f} s)", flush=True)
        for case in _guarded(part, small) if time.perf_counter() - start < limit else [_SKIPPED]:
            late = time.perf_counter() - start > limit
            rows.append({"name": case.name} | (_LATE if late else _measured(case)))
            print(line(rows[-1]), flush=True)
            _write(record | {"seconds": time.perf_counter() - start}, out)
    return record | {"seconds": time.perf_counter() - start}


def _guarded(part: Part, small: bool) -> Iterable[Case]:
    """The part's measurements, and one more with the error if making them fails."""
    try:
        yield from part(small)
    except Exception as error:
        failure = _error(error)
        yield Case("(the part itself)", lambda: failure)


def _measured(case: Case) -> dict[str, Any]:
    try:
        return case.measure()
    except Exception as error:
        return _error(error)


def _error(error: Exception) -> dict[str, Any]:
    where = "".join(traceback.format_tb(error.__traceback__)[-3:])
    return {"error": f"{type(error).__name__}: {error}"[:2000], "where": where}


def line(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    cells = [f"{key} {_short(value)}" for key, value in row.items() if key not in ("name", "where")]
    return f"  {row['name']:<44} " + "  ".join(cells)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]


def _write(record: dict[str, Any], out: pathlib.Path | None) -> None:
    """Replaces the file in one go: an interruption leaves the last one whole."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, default=float) + "\n")
    partial.replace(out)
