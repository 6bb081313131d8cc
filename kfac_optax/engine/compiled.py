"""A training step compiled once for every kind that a schedule on the host asks for."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kfac_optax._types import PyTree

Schedule = Callable[[int], Mapping[str, Any]]
COUNT = "kfac_count"  # field of `CurvatureState` that counts steps


def compile_step(
    function: Callable[..., PyTree],
    schedule: Schedule,
    *,
    donate_argnums: int | Sequence[int] = (),
    **options: Any,
) -> "CompiledStep":
    """Compiles a training step without branches, one program for every kind of step.

    `function` is the step as one would give it to `jax.jit`, with `**due` behind its arguments and
    handed on to `tx.update`. A call asks the schedule what is due, compiles that kind of step if it
    is new, and runs it:

        def train_step(params, opt_state, x, y, key, **due):
            loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
            updates, opt_state = tx.update(
                grads, opt_state, params, curvature=fisher.at(params, x, key=key), **due
            )
            return optax.apply_updates(params, updates), opt_state, loss

        step = ko.compile_step(train_step, ko.HostSchedule(10, 100), donate_argnums=(0, 1))

        for x, y in batches:
            params, opt_state, loss = step(params, opt_state, x, y, key)

    What is due follows from the number of the step. A state that the last call has returned is the
    next step; of any other (a fresh one, one from a checkpoint) the count that it holds is read.
    The periods of the schedule are those that count, whatever `tx` was made with.

    Args:
      function: takes and returns, among others, the optimizer state, in any place and container;
        not compiled itself.
      schedule: what is due at a step, `int -> {name: value}`; a `HostSchedule`.
      donate_argnums: arguments whose memory the step may reuse, as in `jax.jit`: give it what the
        step returns anew, parameters and optimizer state. The arrays given are gone then.
      **options: further arguments of `jax.jit`, shardings for example.

    Returns:
      A function with the arguments and results of `function`, without `**due`. Its `count` is the
      number of the next step, its `kinds` the compiled functions by what is due.

    Raises:
      TypeError: `function` is compiled already, or does not take what is due; an argument is traced.
      ValueError: the arguments or results hold no count of steps, or several that differ; the first
        step did not count.

    >>> import optax, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> w, x = jax.numpy.zeros((2, 1)), jax.numpy.eye(2)
    >>> tx = ko.kfac(estimator.layers(w, x), kl_clip=None)
    >>> def train_step(w, state, x, **due):
    ...     updates, state = tx.update(w - 1, state, w, curvature=estimator.at(w, x), **due)
    ...     return w - 0.1 * updates, state
    >>> step, state = compile_step(train_step, ko.HostSchedule(2, 4)), tx.init(w)
    >>> for _ in range(8):
    ...     w, state = step(w, state, x)
    >>> print(step.count, len(step.kinds))
    8 3
    """
    return CompiledStep(function, schedule, dict(options, donate_argnums=donate_argnums))


class CompiledStep:
    """What `compile_step` returns.

    Attributes:
      kinds: compiled functions by what is due.
      count: number of the next step, `None` before the first.
    """

    def __init__(self, function: Callable[..., PyTree], schedule: Schedule, options: dict):
        _check_function(function, schedule)
        self.kinds: dict[tuple, Any] = {}
        self.count: int | None = None
        self._function, self._schedule, self._options = function, schedule, options
        self._returned: Any = None  # the count, as an array, of the state last returned
        self._places: dict[Any, list[int]] = {}  # of counts among the leaves, by structure

    def __call__(self, *args: Any, **kwargs: Any) -> PyTree:
        """One step."""
        counts = self._counts("arguments", (args, kwargs))
        # the very array that was returned: its number is known without waiting for the device
        known = self.count is not None and counts[0] is self._returned
        count = self.count if known else _read(counts)
        assert count is not None
        result = self._kind(count)(*args, **kwargs)
        counts = self._counts("results", result)
        # once, where the host starts to count by itself
        if not known:
            _check_counted(count, _read(counts))
        self.count, self._returned = count + 1, counts[0]
        return result

    def _kind(self, count: int) -> Any:
        """The compiled function of this step."""
        due = dict(self._schedule(count))
        # sorted: the order of the schedule's words makes no second program
        kind = tuple(sorted(due.items()))
        if kind not in self.kinds:
            self.kinds[kind] = jax.jit(_bound(self._function, due), **self._options)
        return self.kinds[kind]

    def _counts(self, where: str, tree: PyTree) -> list[Any]:
        """The counts in a tree; their places are looked for once per structure."""
        leaves, structure = jax.tree.flatten(tree)
        if structure not in self._places:
            self._places[structure] = _places(where, tree)
        return [leaves[i] for i in self._places[structure]]


def _bound(function: Callable[..., PyTree], due: dict[str, Any]) -> Callable[..., PyTree]:
    """`function` with what is due; keeps its signature, for `donate_argnames` and the like."""

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> PyTree:
        return function(*args, **kwargs, **due)

    return step


def _places(where: str, tree: PyTree) -> list[int]:
    """Where among the leaves the counts are."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    fields = [getattr(path[-1], "name", "") if path else "" for path in paths]
    found = [i for i, field in enumerate(fields) if field == COUNT]
    if not found:
        raise ValueError(
            f"compile_step: got {where} without a count of steps ({COUNT}); expected the optimizer "
            "state of a preconditioner with curvature among them. Optimizers that see gradients "
            "alone have no kinds of steps: use jax.jit."
        )
    return found


def _read(counts: list[Any]) -> int:
    """The number of the step that a state holds; waits for it."""
    try:
        numbers = {int(count) for count in counts}
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(
            "compile_step: got traced arguments; the host has to know the number of the step. Call "
            "it outside jit, scan and grad."
        ) from error
    if len(numbers) > 1:
        raise ValueError(
            f"compile_step: got states with different counts, {sorted(numbers)}; expected one "
            # several states (of optax.partition, say) have a count each
            "number, since one schedule serves all of them. Use the traced schedule, jax.jit."
        )
    return numbers.pop()


def _check_counted(before: int, after: int) -> None:
    """A wrapper that drops states would make every due statistic vanish without a word."""
    if after != before + 1:
        raise ValueError(
            f"compile_step: the count of steps was {before} before the first step and {after} "
            f"after it; expected {before + 1}. Wrappers that keep the old state in some steps "
            "(optax.MultiSteps) need the traced schedule, jax.jit; see docs/howto/accumulation.md."
        )


def _check_function(function: Callable[..., PyTree], schedule: Schedule) -> None:
    if hasattr(function, "lower"):
        raise TypeError(
            "compile_step: got a function that is compiled already; expected the plain one, since "
            "what is due is decided while tracing. Leave jax.jit out."
        )
    if not callable(schedule):
        raise TypeError(
            f"compile_step: schedule is {schedule!r}; expected a function of the step's number, "
            "such as ko.HostSchedule(curvature_every=10, inverse_every=100)."
        )
    parameters = inspect.signature(function).parameters.values()
    # **due takes whatever a schedule says
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    named = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    missing = sorted(set(schedule(0)) - named)
    if missing:
        raise TypeError(
            f"compile_step: the step does not take {', '.join(missing)}. Add **due behind its "
            "arguments, and hand it on: tx.update(..., **due)."
        )
