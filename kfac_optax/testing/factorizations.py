"""Which factorisations of a program may run at the same time, and which take several matrices."""

import math
import re


def side_by_side(program: str) -> tuple[list[tuple[str, str]], int]:
    """Pairs of LAPACK calls without a path of data between them, and the number of calls.

    On the CPU, JAX spreads a batched call over a pool of threads while one thread of that pool
    waits for it. Two at a time can take all threads for waiting, and the step never returns.

    Args:
      program: the text of a program compiled for the CPU, `compiled.as_text()`.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.eye(2)
    >>> apart = jax.jit(lambda x, y: (jnp.linalg.eigh(x), jnp.linalg.eigh(y))).lower(x, x)
    >>> pairs, calls = side_by_side(apart.compile().as_text())
    >>> print(len(pairs), calls)
    1 2
    """
    pairs: list[tuple[str, str]] = []
    count = 0
    with_calls: set[str] = set()
    computation = ""
    before: dict[str, set[str]] = {}
    calls: list[str] = []
    for line in program.splitlines():
        # a computation; those that it uses came before
        if match := re.match(r"(?:ENTRY )?(%[\w.-]+) .*\{$", line):
            computation, before, calls = match[1], {}, []
            continue
        match = re.match(r" +(?:ROOT )?(%[\w.-]+) = (.*)", line)
        if match is None:
            continue
        name, rest = match.groups()
        uses = set(re.findall(r"%[\w.-]+", rest))
        before[name] = set().union(*(before[use] | {use} for use in uses if use in before))
        direct = 'custom_call_target="lapack_' in rest
        if direct or uses & with_calls:
            pairs += [(other, name) for other in calls if other not in before[name]]
            calls.append(name)
            count += direct
            with_calls.add(computation)
    return pairs, count


def stacked(program: str) -> tuple[list[str], int]:
    """LAPACK calls that take more than one matrix, by target, and the number of all calls.

    On a CPU with several devices in one process these wait for threads that all devices share.

    Args:
      program: text in XLA's language, `lowered.as_text("hlo")` or `compiled.as_text()`.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.zeros((3, 2, 2))
    >>> print(stacked(jax.jit(jnp.linalg.cholesky).lower(x).as_text("hlo")))
    (['lapack_spotrf_ffi'], 1)
    """
    found: list[str] = []
    count = 0
    for line in program.splitlines():
        target = re.search(r'custom_call_target="(lapack_\w+)"', line)
        if target is None:
            continue
        count += 1
        # the first result is as large as the matrices, [..., m, n]
        shape = re.search(r"\[([\d,]*)\]", line)
        sizes = [int(size) for size in shape[1].split(",")] if shape else []
        if math.prod(sizes[:-2]) > 1:
            found.append(target[1])
    return found, count
