"""Times of training steps as ratios to a step of SGD in the same run."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

import kfac_optax as ko
from benchmarks.accelerator import steps
from benchmarks.parts import Case
from benchmarks.timing import Program, compile_together, equations, seconds_of

PERIODS = ((10, 100), (5, 15))  # of statistics and of inverses
ADAPT_EVERY = 5
BUDGET = 1.5  # seconds of repetitions for one kind of step
IN_A_ROW = 20  # steps of optimizers that have only one kind; two of their periods
_sgd: dict[int, float] = {}  # seconds of a step of SGD by problem


def training(
    make: Callable[[bool], steps.Problem], small: bool, only: tuple[str, ...] | None = None
) -> Iterable[Case]:
    """Every optimizer on one network, SGD first."""
    if unknown := set(only or ()) - set(steps.OPTIMIZERS):
        raise ValueError(f"got {sorted(unknown)}, expected some of {list(steps.OPTIMIZERS)}")
    problem = make(small)
    names = [name for name in steps.OPTIMIZERS if only is None or name in only]
    programs = compile_together(
        {
            (name, kind): functools.partial(_lower, problem, steps.OPTIMIZERS[name], kind)
            for name in names
            for kind in ("init", *steps.OPTIMIZERS[name].kinds)
        }
    )
    for name in names:
        compiled = {kind: future for (owner, kind), future in programs.items() if owner == name}
        yield from _cases(problem, name, compiled, small)


def _lower(problem: steps.Problem, optimizer: steps.Optimizer, kind: str) -> Any:
    """The first optimizer state, or a step of some kind."""
    if kind == "init":
        init = steps.transformation(problem, optimizer).init
        return jax.jit(init).lower(problem.start[0])
    step = steps.step_of(problem, optimizer, optimizer.kinds[kind])
    known = steps.shapes(problem, optimizer)
    return jax.jit(step, donate_argnums=(0, 1, 2)).lower(*known)


class Runner:
    """Steps from where the last one ended; what they are given is their own, to be donated."""

    def __init__(self, problem: steps.Problem, init: Callable[..., Any]):
        start = (*problem.start, init(problem.start[0]))
        self.carried = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), start)
        self.batch = (problem.network.x, problem.network.y, jax.random.key(2))

    def __call__(self, programs: Iterable[Program]) -> Any:
        for program in programs:
            self.carried = program.call(*self.carried, *self.batch)
        return self.carried


def _cases(problem: steps.Problem, name: str, compiled: dict[str, Any], small: bool):
    """Each kind of step, then what a step costs on average."""
    optimizer = steps.OPTIMIZERS[name]
    seconds: dict[str, float] = {}
    running: list[Runner] = []  # made when first needed

    def timed(kinds: list[str]) -> dict[str, float]:
        """Seconds of a step, on average over these kinds in a row."""
        programs = [compiled[kind].result() for kind in kinds]
        if not running:
            running.append(Runner(problem, compiled["init"].result().call))
        budget = 0 if small else BUDGET
        spent = seconds_of(lambda: running[0](programs), budget=budget) / len(kinds)
        if name == "sgd":
            _sgd[id(problem)] = spent
        return _over_sgd(spent, problem)

    def alone(kind: str) -> dict[str, Any]:
        program = compiled[kind].result()
        found = timed([kind] * (IN_A_ROW if len(optimizer.kinds) == 1 else 1))
        seconds[kind] = found["seconds"]
        costs = {"trace s": program.trace_s, "compile s": program.compile_s}
        return found | costs | {"total bytes": program.memory.get("total", 0)}

    if len(optimizer.kinds) == 1:
        yield Case(f"{name}: {IN_A_ROW} steps", lambda: alone("traced"))
        return
    for kind in (kind for kind in optimizer.kinds if kind != "traced"):
        yield Case(f"{name}: {kind}", functools.partial(alone, kind))
    for periods in PERIODS:
        due = ko.HostSchedule(*periods, adapt_every=ADAPT_EVERY if optimizer.value else None)
        kinds = [_kind(due(step)) for step in range(periods[1])]
        label = f"{name}: {periods[0]}/{periods[1]}"
        mean = lambda kinds=kinds: _over_sgd(sum(map(seconds.get, kinds)) / len(kinds), problem)
        yield Case(f"{label}, mean of the kinds", mean)
        yield Case(f"{label}, host's count", functools.partial(timed, kinds))
    # the preset's own periods are compiled in, 10/100, and of an adaptive one 5/15 after a warm-up
    yield Case(f"{name}: traced schedule, 100 steps", lambda: timed(["traced"] * 100))


def _over_sgd(spent: float, problem: steps.Problem) -> dict[str, float]:
    return {"seconds": spent, "/ SGD": spent / _sgd.get(id(problem), float("nan"))}


def _kind(due: dict[str, Any]) -> str:
    """The kind of step that a schedule asks for; a new damping in a plain step or not at all."""
    if due["refresh"]:
        return "inverses"
    if due["measure"]:
        return "statistics"
    return "damping" if due.get("adapt") else "plain"


def compile_cost(small: bool) -> Iterable[Case]:
    """Equations, size of the program and seconds to compile, one after another."""
    for label, make in (("autoencoder", steps.autoencoder), ("stack", steps.stack)):
        problem = make(small)
        base: list[float] = []
        for name in ("sgd", "kfac, cholesky", "kfac, eigh", "kfac_two_level"):
            optimizer = steps.OPTIMIZERS[name]
            for kind, due in optimizer.kinds.items():
                measure = functools.partial(_compile_cost, problem, optimizer, due, base)
                yield Case(f"{label}, {name}: {kind}", measure)


def _compile_cost(
    problem: steps.Problem, optimizer: steps.Optimizer, due: Any, base: list[float]
) -> dict[str, Any]:
    step = steps.step_of(problem, optimizer, due)
    traced = jax.jit(step).trace(*steps.shapes(problem, optimizer))
    lowered = traced.lower()
    (program,) = compile_together({"one": lambda: lowered}).values()
    compiled, spent = program.result().call, program.result().compile_s
    base.append(spent)
    sizes = {
        "equations": equations(traced.jaxpr.jaxpr),
        "lines of HLO": lowered.as_text().count("\n"),
        "compiled lines": compiled.as_text().count("\n"),
    }
    return sizes | {"compile s": spent, "compile / SGD": spent / base[0]}


def donation(small: bool) -> Iterable[Case]:
    """A step with and without giving parameters and state away; peaks are those so far."""
    problem = steps.autoencoder(small)
    for kind in ("plain", "inverses"):
        for donated in (True, False):
            measure = functools.partial(_donation, problem, kind, donated, small)
            yield Case(f"{kind} step, {'donated' if donated else 'kept'}", measure)


def _donation(problem: steps.Problem, kind: str, donated: bool, small: bool) -> dict[str, Any]:
    optimizer = steps.OPTIMIZERS["kfac, cholesky"]
    step = steps.step_of(problem, optimizer, optimizer.kinds[kind])
    jitted = jax.jit(step, donate_argnums=(0, 1, 2) if donated else ())
    lowered = jitted.lower(*steps.shapes(problem, optimizer))
    program = compile_together({"one": lambda: lowered})["one"].result()
    run = Runner(problem, jax.jit(steps.transformation(problem, optimizer).init))
    spent = seconds_of(lambda: run([program]), budget=0 if small else BUDGET)
    seen = jax.devices()[0].memory_stats() or {}
    peak = {name: seen[name] for name in ("bytes_in_use", "peak_bytes_in_use") if name in seen}
    return {"seconds": spent} | program.memory | peak
