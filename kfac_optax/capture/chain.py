"""Chains of dense layers with elementwise activations between them: what recursions through layers
need.

The program is run once more, and every value behind a layer's output remembers which output it is
made of and, where it is made entry by entry, its derivative.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax.capture.evaluate import run_equations
from kfac_optax.capture.jaxpr.calls import bodies, call_body
from kfac_optax.capture.layers import Traced
from kfac_optax.capture.tap import tap_p

# Operations whose result has one entry for every entry of their operands.
_ARITHMETIC = ("abs", "add", "add_any", "div", "max", "min", "mul", "neg", "rem", "sign", "sub")
_POWERS = ("cbrt", "integer_pow", "pow", "rsqrt", "sqrt", "square")
_EXPONENTIALS = ("exp", "exp2", "expm1", "log", "log1p", "logistic", "erf", "erfc", "erf_inv")
_CIRCULAR = ("sin", "cos", "tan", "asin", "acos", "atan", "atan2")
_HYPERBOLIC = ("sinh", "cosh", "tanh", "asinh", "acosh", "atanh")
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "is_finite")
_CHOSEN = ("select_n", "clamp", "ceil", "floor", "round")
_SAME = ("convert_element_type", "copy", "copy_p", "reduce_precision", "stop_gradient")
_ELEMENTWISE = frozenset(
    _ARITHMETIC + _POWERS + _EXPONENTIALS + _CIRCULAR + _HYPERBOLIC + _COMPARED + _CHOSEN + _SAME
)
# Calls whose derivative is the one to take, and whose body says what they compute.
_OWN_DERIVATIVE = ("custom_jvp_call",)


class Chain(NamedTuple):
    """A chain at one batch, in order of execution.

    Attributes:
      inputs: of each layer, `[N, p]` without the bias coordinate.
      slopes: derivative of the next layer's input in this layer's output, `[N, q]`; none of the
        last layer.
      outputs: flat result of the program.
    """

    inputs: tuple[jax.Array, ...]
    slopes: tuple[jax.Array, ...]
    outputs: tuple[Any, ...]


class _Mark(NamedTuple):
    """What a value is made of.

    Attributes:
      sources: which layers' outputs.
      slope: its derivative in that of the only one; `None` where entries have been mixed.
      mixed: the operation that mixed them.
    """

    sources: frozenset[int]
    slope: Any
    mixed: str


class _Run(NamedTuple):
    where: str
    names: tuple[str, ...]  # of the layers at each tap
    inputs: list[jax.Array]
    slopes: list[jax.Array]


def chain_of(where: str, traced: Traced, inputs: Sequence[Any]) -> Chain:
    """Runs a model that is a chain, and keeps what its layers see and the slopes between them.

    Args:
      where: for errors.
      traced: the model.
      inputs: leaves of its parameters and arguments.

    Returns:
      A `Chain`; a value that only depends on the data may enter anywhere.

    Raises:
      ValueError: the model is something else; names the layer and what stands behind it.

    >>> from kfac_optax.capture.layers import trace
    >>> w, x = {"w": jnp.zeros((1, 1)), "v": jnp.ones((1, 1))}, jnp.ones((2, 1))
    >>> def model(p, x): return jnp.tanh(x @ p["w"]) @ p["v"]
    >>> chain = chain_of("here", trace(model, w, (x,), "here"), [w["v"], w["w"], x])
    >>> print(len(chain.inputs), chain.slopes[0].ravel())
    2 [1. 1.]
    """
    _check_layers(where, traced)
    names = tuple(traced.layers.layers[i].path or "(root)" for i in traced.owner)
    run = _Run(where, names, [], [])
    closed = traced.jaxpr
    no_marks: list[_Mark | None] = [None] * len(inputs)
    outputs, marks = _evaluate(run, closed, list(inputs), no_marks)
    # whatever is predicted has to come through the last layer alone, or from the data
    last = frozenset({len(names) - 1})
    for mark in marks:
        # None: from the data alone
        if mark is not None and mark.sources != last:
            first = names[min(mark.sources)]
            raise ValueError(f"{where}: the output of layer {first!r} {_PAST_NEXT}; {_EXPECTED}")
    return Chain(tuple(run.inputs), tuple(run.slopes), tuple(outputs))


_PAST_NEXT = "reaches the prediction past the layers that follow"
_EXPECTED = (
    "expected dense layers that run once, one after another, with activations between them that "
    "act on each entry alone, and one row for each example. Use ggn(predict) or fisher(predict) for "
    "other models."
)


def _check_layers(where: str, traced: Traced) -> None:
    """Raises where a layer is no dense layer of a chain, by name."""
    for site, owner in zip(traced.sites, traced.owner, strict=True):
        if owner < 0:
            raise ValueError(f"{where}: the use {site.name!r} belongs to no layer; {_EXPECTED}")
        layer = traced.layers.layers[owner]
        what = None
        if layer.kind != "dense":
            what = f"is of kind {layer.kind!r}"
        elif layer.copies > 1 or site.scans or site.stacked:
            what = f"is a stack of {layer.copies} or runs in a scan"
        elif layer.uses > 1 or layer.swapped or layer.partly:
            what = f"runs {layer.uses} times, or not only as x @ kernel + bias"
        elif len(site.row_shape) != 1:
            what = f"has rows {list(site.row_shape)}"
        if what is not None:
            raise ValueError(f"{where}: layer {layer.path or '(root)'!r} {what}; {_EXPECTED}")


def _evaluate(
    run: _Run,
    closed: Any,
    values: list[Any],
    marks: list[_Mark | None],
) -> tuple[list[Any], list[_Mark | None]]:
    """Results of a program and what they are made of."""
    jaxpr = closed.jaxpr
    variables = [*jaxpr.constvars, *jaxpr.invars]
    env = dict(zip(variables, [*closed.consts, *values], strict=True))
    known = dict(zip(jaxpr.invars, marks, strict=True))

    # values of the program, and what each is made of
    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    def mark_of(v: Any) -> _Mark | None:
        return None if isinstance(v, jex.Literal) else known.get(v)

    for eqn in jaxpr.eqns:
        # what its operands are made of decides what its results are made of
        given = list(map(mark_of, eqn.invars))
        mine: list[_Mark | None]
        if eqn.primitive is tap_p:
            s, a = map(read, eqn.invars[:2])
            index = _at_layer(run, a, given[1])
            values = [s]
            mine = [_start(index, s)]
        elif (body := call_body(eqn)) is not None:
            operands = list(map(read, eqn.invars))
            values, mine = _evaluate(run, body, operands, given)
        else:
            values, mine = _one(jaxpr, eqn, env, given)
        env.update(zip(eqn.outvars, values, strict=True))
        known.update(zip(eqn.outvars, mine, strict=True))
    return list(map(read, jaxpr.outvars)), list(map(mark_of, jaxpr.outvars))


def _start(index: int, s: jax.Array) -> _Mark:
    """The mark of a layer's own output."""
    return _Mark(frozenset({index}), jnp.ones_like(s), "")


def _at_layer(
    run: _Run,
    a: jax.Array,
    mark: _Mark | None,
) -> int:
    """Notes what a layer sees, and the slope of it in the output of the layer in front; its number."""
    index = len(run.inputs)
    run.inputs.append(a)
    if index == 0:  # it sees the data, however they were prepared
        return index
    name, before = run.names[index], run.names[index - 1]
    if mark is None or mark.sources != frozenset({index - 1}):
        made = "nothing before it" if mark is None else _listed(run, mark)
        raise ValueError(
            f"{run.where}: layer {name!r} sees {made}, not the output of {before!r} alone; "
            f"{_EXPECTED}"
        )
    if mark.slope is None:
        raise ValueError(
            f"{run.where}: between layers {before!r} and {name!r} stands `{mark.mixed}`, which "
            f"mixes entries; {_EXPECTED}"
        )
    run.slopes.append(mark.slope)
    return index


def _listed(run: _Run, mark: _Mark) -> str:
    names = [repr(run.names[i]) for i in sorted(mark.sources)]
    return "outputs of " + ", ".join(names)


def _one(
    jaxpr: Any,
    eqn: Any,
    env: dict[Any, Any],
    marks: Sequence[_Mark | None],
) -> tuple[list[Any], list[_Mark | None]]:
    """One operation without layers in it."""
    marked = zip(eqn.invars, marks, strict=True)
    found = {v: mark for v, mark in marked if mark is not None}

    # the operation as a function of what layers have a part in
    def call(*operands: Any) -> list[Any]:
        mine = {v: env[v] for v in eqn.invars if not isinstance(v, jex.Literal)}
        mine |= dict(zip(found, operands, strict=True))
        run_equations(jaxpr, [eqn], mine)
        return [mine.get(v) for v in eqn.outvars]  # None where it is dropped

    values = [env[v] for v in found]
    if not found:  # data, parameters, constants
        return call(), [None] * len(eqn.outvars)
    # one layer's output, entry by entry: the chain rule for numbers; anything else has no slope
    sources = frozenset().union(*(m.sources for m in found.values()))
    slopes = [m.slope for m in found.values()]
    shapes = {v.aval.shape for v in found}
    mixed = next((m.mixed for m in found.values() if m.mixed), "")
    if mixed or len(sources) > 1 or not _by_entry(eqn, shapes):
        mark = _Mark(sources, None, mixed or eqn.primitive.name)
        return call(*values), [mark] * len(eqn.outvars)
    outs, along = _with_slopes(call, values, slopes)
    return outs, [_Mark(sources, slope, "") for slope in along]


def _with_slopes(
    call: Callable[..., list[Any]],
    values: list[Any],
    slopes: list[Any],
) -> tuple[list[Any], list[Any]]:
    """Results, and their derivative entry by entry: that along a one in every entry."""
    outs, along = jax.jvp(call, tuple(values), tuple(slopes))
    return list(outs), list(along)


def _by_entry(eqn: Any, shapes: set[tuple[int, ...]]) -> bool:
    """Whether an operation has a result for every entry of operands of one shape."""
    results = {v.aval.shape for v in eqn.outvars}
    return results == shapes and _elementwise(eqn)


def _elementwise(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name in _ELEMENTWISE:
        return True
    if name == "broadcast_in_dim":  # of a number, inside of a function with a rule of its own
        return eqn.invars[0].aval.ndim == 0
    if name not in _OWN_DERIVATIVE and call_body(eqn) is None:
        return False
    # a call is what its body is
    jaxprs = [getattr(body, "jaxpr", body) for body in bodies(eqn)]
    inner = itertools.chain.from_iterable(jaxpr.eqns for jaxpr in jaxprs)
    return all(map(_elementwise, inner))
