"""All benchmarks in one run, or two runs compared: `python -m benchmarks [--compare OLD.json]`.

Writes a JSON file and a page. With `--from RECORD.json`, which may be one of
`benchmarks.accelerator` too, nothing is measured: the page is made of that record.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import compare, parts, suite


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(suite.PARTS), help="names, with commas between")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks.json"))
    parser.add_argument("--page", type=pathlib.Path, help="Markdown; beside --out by default")
    parser.add_argument("--compare", type=pathlib.Path, metavar="OLD", help="print what changed")
    parser.add_argument("--beyond", type=float, default=1.15, help="factor of a change to report")
    parser.add_argument(
        "--from", type=pathlib.Path, dest="source", help="a record in place of a run"
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--small", action="store_true", help="dry run with tiny sizes")
    options = parser.parse_args(arguments)
    # a record was measured already, and without an old one nothing is compared
    if options.source:
        parts.refuse(parser, options, "--from", ("parts", "out", "limit", "small"))
    if not options.compare:
        parts.refuse(parser, options, "no --compare", ("beyond",))
    # what cannot be read is said before anything runs
    old = compare.read(options.compare) if options.compare else None
    if options.source:
        record = compare.read(options.source)
    else:
        chosen = parts.chosen(parser, options.parts, suite.PARTS)
        command = parts.command("benchmarks", parser, options)
        record = parts.run(
            chosen, command=command, small=options.small, out=options.out, limit=options.limit
        )
    at = options.page or (options.source or options.out).with_suffix(".md")
    at.write_text(compare.page(record))
    if old is not None:
        compare.report(old, record, options.beyond)
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
