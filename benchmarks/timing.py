"""Compiled programs and their running times."""

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# XLA compiles outside Python's lock; half the cores, since it uses threads of its own.
AT_A_TIME = max(1, min(8, (os.cpu_count() or 2) // 2))
SHORT = 0.02  # seconds: shorter calls are timed several at a time, waiting for the last


class Program(NamedTuple):
    """A compiled function. `compile_s` is inflated where several are compiled at a time."""

    call: Any
    trace_s: float
    compile_s: float
    memory: dict[str, int]


def compile_together(
    functions: dict[Any, Callable[[], Any]],
) -> dict[Any, "concurrent.futures.Future[Program]"]:
    """Compiles `{name: function that lowers}` side by side; a future holds its program or its
    error.
    """
    pool = concurrent.futures.ThreadPoolExecutor(AT_A_TIME)
    futures = {}
    for name, lower in functions.items():
        start = time.perf_counter()
        try:
            lowered = lower()
        except Exception as error:
            futures[name] = _failed(error)
            continue
        futures[name] = pool.submit(_compile, lowered, time.perf_counter() - start)
    pool.shutdown(wait=True)
    return futures


def _failed(error: Exception) -> "concurrent.futures.Future[Program]":
    future: concurrent.futures.Future[Program] = concurrent.futures.Future()
    future.set_exception(error)
    return future


def _compile(lowered: Any, trace_s: float) -> Program:
    start = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, trace_s, time.perf_counter() - start, memory_of(compiled))


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes that a program needs, as XLA planned them; nothing where a platform does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return {}
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    return sizes | {"total": sum(sizes.values()) - 2 * sizes["aliased"]}


def seconds_of(function: Callable[[], Any], *, budget: float = 0.5, most: int = 9) -> float:
    """Median seconds of a call. `function` starts one and returns what to wait for."""
    jax.block_until_ready(function())
    once = _together(function, 1)
    inner = 1 if once > SHORT else max(1, min(50, int(SHORT / once)))
    spent = [_together(function, inner)]
    while len(spent) < most and sum(spent) * inner < budget:
        spent.append(_together(function, inner))
    return statistics.median(spent)


def _together(function: Callable[[], Any], times: int) -> float:
    """Seconds of one of so many calls, waiting for the last."""
    start = time.perf_counter()
    result = None
    for _ in range(times):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / times


def equations(jaxpr: Any) -> int:
    """Equations of a jaxpr and of all that it contains."""
    total = 0
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        total += 1 + sum(equations(getattr(x, "jaxpr", x)) for x in inner if _is_jaxpr(x))
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
