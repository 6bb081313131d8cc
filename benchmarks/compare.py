"""Two records of benchmarks against each other, and the page of one."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.ratios import table

# Numbers that do not depend on how fast or how busy a machine is: ratios within one run, counts.
RATIOS = ("/ ", "products")
COUNTS = (
    "equations",
    "lines of HLO",
    "compiled lines",
    "total bytes",
    "memory MB",
    "temporary MB",
)
PAGE_COMMAND = "python -m benchmarks --from benchmarks/latest.json --page docs/benchmarks.md"


class Change(NamedTuple):
    """One number in both records."""

    name: str
    old: float
    new: float

    @property
    def factor(self) -> float:
        return self.new / self.old


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Ratios and counts that both records have, in the order of the new one."""
    for part, rows in new["parts"].items():
        before = {row["name"]: row for row in old["parts"].get(part, [])}
        for row in rows:
            for key, value in row.items():
                known = before.get(row["name"], {}).get(key)
                if _comparable(key) and _positive(known) and _positive(value):
                    yield Change(f"{part}: {row['name']}, {key}", known, value)


def _comparable(key: str) -> bool:
    return key in COUNTS or any(mark in key for mark in RATIOS)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def missing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Measurements of the old record that the new one has not, or has an error for."""
    good = _measured(new)
    return [
        f"{part}: {name}"
        for part, name in _measured(old)
        if part in new["parts"] and (part, name) not in good
    ]


def _measured(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Part and name of what has numbers."""
    return [
        (part, row["name"])
        for part, rows in record["parts"].items()
        for row in rows
        if "error" not in row and "left_out" not in row
    ]


def report(old: dict[str, Any], new: dict[str, Any], beyond: float) -> list[str]:
    """What changed by more than a factor `beyond`, worst first, and what is gone; prints it."""
    found = sorted(changes(old, new), key=lambda change: -change.factor)
    slower = [c for c in found if c.factor > beyond]
    faster = [c for c in found if c.factor < 1 / beyond]
    shown = {
        c.name: {"old": float(c.old), "new": float(c.new), "new / old": c.factor}
        for c in slower + faster
    }
    lines = [f"{len(found)} ratios and counts, {len(slower)} worse, {len(faster)} better"]
    lines += table(shown) if shown else []
    lines += [f"gone: {name}" for name in missing(old, new)]
    device = old["environment"]["device"]
    if device != new["environment"]["device"]:
        lines.append(f"the old record is of another device: {device}")
    print("\n".join(lines))
    return lines


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    about = record["environment"]
    known = ("device", "backend", "cores", "load", "jax", "kfac_optax", "date")
    lines = ["# Benchmarks", "", f"What `{about['command']}` measured: "]
    # an older record does not know how busy its machine was
    lines[-1] += ", ".join(f"{name} {about[name]}" for name in known if name in about) + "."
    lines.append(
        "`load` is what else the machine did at the start, in cores. Times of steps are medians "
        "within one run, compilations are timed once; compare ratios, not seconds."
    )
    lines += ["", "The page of the documentation is made anew by", "", "```text"]
    lines += [about["command"] + " --out benchmarks/latest.json", PAGE_COMMAND, "```"]
    for part, rows in record["parts"].items():
        lines += ["", f"## {part}", ""]
        lines += table({row["name"]: _shown(row) for row in rows})
    return "\n".join(lines) + "\n"


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("name", "where")}


def read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())
