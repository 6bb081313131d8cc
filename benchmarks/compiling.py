"""What a step costs to compile, piece by piece: `python -m benchmarks.compiling resnet20 ...`.

Prints, for each network of `benchmarks.networks` and each kind of step, seconds of tracing and
lowering, of the compiler (time that passed, and of all its threads, which other work beside changes
less), that over the one of SGD, and the kernels that the CPU's compiler has to make. It compiles
kernels that differ in nothing once, and their number is what its time follows; it is the same on
every machine.
"""

import argparse
import re
import time
from typing import Any

from benchmarks.networks import NETWORKS, Network, lowered
from benchmarks.ratios import KINDS, table


def kernels(program: str) -> int:
    """Loops in an optimised program that differ in more than names and numbers of instructions.

    >>> body = "%{0} (a: f32[2]) -> f32[2] {{\\n  ROOT %x.{0} = f32[2] add(%a, %a)\\n}}\\n"
    >>> call = "fusion(%a), kind=kLoop, calls=%{0}\\n"
    >>> print(kernels("".join(text.format(name) for text in (body, call) for name in "pq")))
    1
    """
    # those of libraries are not compiled
    mine = set(re.findall(r"kind=k(?:Loop|Input|Output)\b[^\n]*?calls=%([\w.-]+)", program))
    found = re.findall(r"^%(\S+) (\(.*?^})", program, re.DOTALL | re.MULTILINE)
    bodies = [body for name, body in found if name in mine]
    return len({re.sub(r"%[\w.-]+|metadata=\{.*?\}|param_\d+\S*", "", body) for body in bodies})


def measure(network: Network) -> dict[str, dict[str, Any]]:
    """A row for each kind of step."""
    kinds: dict[str, dict[str, Any]] = {"SGD": {"sgd": True}}
    for label, (statistics, inverses) in KINDS.items():
        kinds[label] = {"measure": statistics, "refresh": inverses}
    kinds["traced schedule"] = {}
    # the first program of a process pays for more than itself
    _compiled(network, sgd=True)
    rows = {label: _compiled(network, **kind) for label, kind in kinds.items()}
    for row in rows.values():
        row["threads / SGD"] = row["threads s"] / rows["SGD"]["threads s"]
    return rows


def _compiled(network: Network, **kind: Any) -> dict[str, Any]:
    start = time.perf_counter()
    step = lowered(network, **kind)
    traced, spent = time.perf_counter(), time.process_time()
    program = step.compile()
    done, all_threads = time.perf_counter(), time.process_time()
    return {
        "trace s": traced - start,
        "compile s": done - traced,
        "threads s": all_threads - spent,
        "kernels": kernels(program.as_text()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", choices=[*NETWORKS])
    for name in parser.parse_args().networks:
        print(f"\n{name}")
        print("\n".join(table(measure(NETWORKS[name]()))), flush=True)


if __name__ == "__main__":
    main()
