"""Static analysis of a traced function: where the taps are and, by data flow, whose parameters they
see.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax.capture.geometry import Geometry, rows_shape
from kfac_optax.capture.tap import tap_p

# One output per input, values (not shapes) kept or merely rounded: a parameter stays the same
# parameter.
_TRANSPARENT = frozenset(
    [
        "convert_element_type",
        "copy",
        "copy_p",
        "optimization_barrier",
        "sharding_constraint",
        "layout_constraint",
        "mesh_cast",
        "reshard",
        "pvary",
        "pcast",
        "reduce_precision",
        "name",
    ]
)
# behind it a parameter is a constant: no use that a gradient or a statistic sees
STOPPED = "stop_gradient"
_RESHAPING = frozenset(["broadcast_in_dim", "reshape", "squeeze", "expand_dims"])
# Calls that run their body once with the operands in order.
_CALLS = frozenset(["jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call"])
# Calls whose derivative is a rule of their own, so what happens inside says nothing about it: they
# are never entered.
_RULES = {
    "custom_jvp_call": "custom_jvp",
    "custom_vjp_call": "custom_vjp",
    "custom_vjp_call_jaxpr": "custom_vjp",
    "custom_linear_solve": "custom_linear_solve",
}


class Origin(NamedTuple):
    """Which parameter leaf a value is: `depth` leading axes already taken by scans.

    `permutation` says which stored axes (from the end) its trailing axes are; `()` if none has
    moved. Once reshaped or broadcast the value is no longer `whole`: not a layer's parameter, but
    still worth naming its consumer.
    """

    leaf: int
    depth: int = 0
    permutation: tuple[int, ...] = ()
    whole: bool = True


class Site(NamedTuple):
    """One tapped call, as tracing saw it. Shapes are those inside all enclosing scans.

    Attributes:
      name, geometry: from the tap.
      params: origin of each parameter operand, `None` if it is not a parameter as stored.
      kernel: shape of the first of them, as the layer uses it.
      a, s: abstract input and output, behind `stacked` leading axes.
      stacked: leading axes of stacked parameters (from `vmap` over parameters).
      scans: for every enclosing scan, outermost first: (length, whether the parameters are scanned
        over).
      varies: whether input or output depend on arrays among the arguments of the model, not on
        constants and parameters only; true where it has none.
    """

    name: str
    geometry: Geometry
    params: tuple[Origin | None, ...]
    kernel: tuple[int, ...]
    a: Any
    s: Any
    stacked: int
    scans: tuple[tuple[int, bool], ...]
    varies: bool = True

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the axes along which the parameters differ."""
        return tuple(n for n, rides in self.scans if rides) + self.a.shape[: self.stacked]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """`(N, *positions)` of one use."""
        return rows_shape(self.geometry, self.a.shape[self.stacked :], self.s.shape[self.stacked :])

    @property
    def loops(self) -> tuple[int, ...]:
        """Lengths of the scans in which the parameters are the same in every step."""
        return tuple(n for n, rides in self.scans if not rides)


class Analysis(NamedTuple):
    """Sites in order of execution, and for every parameter leaf what else consumes it."""

    sites: tuple[Site, ...]
    consumers: dict[int, list[str]]


def bodies(eqn: Any) -> list[Any]:
    """Jaxprs an equation contains."""
    return list(jex.jaxprs_in_params(eqn.params))


def count_taps(jaxpr: Any) -> int:
    """Number of taps in a jaxpr, bodies included."""
    return sum(map(count_taps_of, jaxpr.eqns))


def count_taps_of(eqn: Any) -> int:
    """Taps in one equation; those inside a call with its own derivative rule are none."""
    if eqn.primitive is tap_p:
        return 1
    return 0 if eqn.primitive.name in _RULES else sum(map(count_taps, bodies(eqn)))


def own_rule(eqn: Any) -> str | None:
    """Which derivative rule of its own an equation has, by the name of what it was made from; else
    `None`.
    """
    word = _RULES.get(eqn.primitive.name)
    inner = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
    if word is None or inner is None:
        return word
    name = getattr(getattr(inner, "jaxpr", inner).debug_info, "func_name", "")
    return f"{word} `{name}`" if name else word


def is_rule(consumer: str) -> bool:
    """Whether a consumer, as named in an `Analysis`, is a call with its own derivative rule."""
    return consumer.partition(" ")[0] in _RULES.values()


def call_body(eqn: Any) -> Any | None:
    """The closed body of an equation that runs it once (`jit`, `remat`), else `None`."""
    if eqn.primitive.name not in _CALLS:
        return None
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)
    return inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, [])


class ScanBody(NamedTuple):
    """A scan's closed body and how its operands divide: `constants`, then `carried`, then scanned
    over.
    """

    body: Any
    constants: int
    carried: int


def scan_body(eqn: Any) -> ScanBody:
    """Layout of a scan equation; JAX 0.11 replaced two counts by one tree of operands."""
    inner = eqn.params["jaxpr"]
    body = inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, [])
    if "num_consts" in eqn.params:
        return ScanBody(body, eqn.params["num_consts"], eqn.params["num_carry"])
    constants, carried, _ = map(len, eqn.params["ft_in"].unpack())
    return ScanBody(body, constants, carried)


def analyse(jaxpr: Any, leaves: int) -> Analysis:
    """Finds all sites of a jaxpr whose first `leaves` inputs are the parameter leaves.

    Raises:
      ValueError: a tapped layer runs inside `cond`, `while_loop` or another primitive where it has
        no meaning.
    """
    sites: list[Site] = []
    consumers: dict[int, list[str]] = {}
    origins = [Origin(i) if i < leaves else None for i in range(len(jaxpr.invars))]
    _note(_walk(jaxpr, origins, (), sites, consumers), "the prediction itself", consumers)
    data = [i >= leaves and _may_hold_examples(v.aval) for i, v in enumerate(jaxpr.invars)]
    flags: list[bool] = []
    dependence(jaxpr, data, flags)
    # a model that closes over its batch shows no difference between data and constants
    sites = [
        site._replace(varies=varies or not any(data))
        for site, varies in zip(sites, flags, strict=True)
    ]
    return Analysis(tuple(sites), consumers)


def _may_hold_examples(aval: Any) -> bool:
    return aval.ndim > 0 and not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def dependence(jaxpr: Any, inputs: Sequence[bool], taps: list[bool]) -> list[bool]:
    """Which outputs depend on the inputs marked; appends to `taps` whether each tap does, in order."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        marks = [not isinstance(v, jex.Literal) and known.get(v, False) for v in eqn.invars]
        outputs = [any(marks)] * len(eqn.outvars)
        if eqn.primitive is tap_p:
            taps.append(marks[0] or marks[1])  # a shift has no input
        elif (body := call_body(eqn)) is not None:
            outputs = dependence(body.jaxpr, marks, taps)
        elif eqn.primitive.name == "scan":
            outputs = _dependence_of_scan(eqn, marks, taps)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [not isinstance(v, jex.Literal) and known.get(v, False) for v in jaxpr.outvars]


def _dependence_of_scan(eqn: Any, marks: list[bool], taps: list[bool]) -> list[bool]:
    closed, constants, carried = scan_body(eqn)
    first = constants + carried
    while True:  # what one step writes into the carry, the next one reads
        inside: list[bool] = []
        outputs = dependence(closed.jaxpr, marks, inside)
        carry = [
            old or new for old, new in zip(marks[constants:first], outputs[:carried], strict=True)
        ]
        if carry == marks[constants:first]:
            taps.extend(inside)
            return [*carry, *outputs[carried:]]
        marks = [*marks[:constants], *carry, *marks[first:]]


def _walk(
    jaxpr: Any,
    origins: Sequence[Origin | None],
    scans: tuple,
    sites: list[Site],
    consumers: dict[int, list[str]],
) -> list[Origin | None]:
    known: dict[Any, Origin | None] = dict(zip(jaxpr.invars, origins, strict=True))

    def source(v: Any) -> Origin | None:
        return None if isinstance(v, jex.Literal) else known.get(v)

    for eqn in jaxpr.eqns:
        inputs = [source(v) for v in eqn.invars]
        outputs: Sequence[Origin | None] = [None] * len(eqn.outvars)
        if eqn.primitive is tap_p:
            _add_site(eqn, inputs, scans, sites)
        elif (body := call_body(eqn)) is not None:
            outputs = _walk(body.jaxpr, inputs, scans, sites, consumers)
        elif eqn.primitive.name == "scan":
            outputs = _walk_scan(eqn, inputs, scans, sites, consumers)
        elif (rule := own_rule(eqn)) is not None:
            _note(inputs, rule, consumers)
        elif eqn.primitive.name == STOPPED:
            _note(inputs, STOPPED, consumers)
        elif eqn.primitive.name in _TRANSPARENT:
            outputs = inputs[: len(eqn.outvars)]
        elif eqn.primitive.name in _RESHAPING:
            outputs = [None if inputs[0] is None else inputs[0]._replace(whole=False)]
        elif eqn.primitive.name == "transpose":
            outputs = [
                None if inputs[0] is None else _transposed(inputs[0], eqn.params["permutation"])
            ]
        else:
            _refuse_taps(eqn, eqn.primitive.name)
            _note(inputs, eqn.primitive.name, consumers)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [source(v) for v in jaxpr.outvars]


def _walk_scan(eqn, inputs, scans, sites, consumers) -> list[Origin | None]:
    closed, constants, carried = scan_body(eqn)
    body, length = closed.jaxpr, eqn.params["length"]
    first = constants + carried
    # a carry that every step hands on untouched is a constant of the scan
    kept = [body.outvars[i] is body.invars[constants + i] for i in range(carried)]
    carry = [o if keep else None for o, keep in zip(inputs[constants:first], kept, strict=True)]
    slices = [
        _sliced(o, v.aval.ndim) for o, v in zip(inputs[first:], eqn.invars[first:], strict=True)
    ]
    _note(
        [o for o, keep in zip(inputs[constants:first], kept, strict=True) if not keep],
        "scan",
        consumers,
    )
    start = len(sites)
    outs = _walk(body, [*inputs[:constants], *carry, *slices], (*scans, length), sites, consumers)
    _note([o for o, keep in zip(outs[:carried], kept, strict=True) if not keep], "scan", consumers)
    depth = len(scans)
    # now it is known for each layer whether this scan goes over its parameters
    for i in range(start, len(sites)):
        leaf = sites[i].params[0]
        rides = leaf is not None and any(o is not None and o.leaf == leaf.leaf for o in slices)
        marked = list(sites[i].scans)
        marked[depth] = (length, rides)
        sites[i] = sites[i]._replace(scans=tuple(marked))
    # stacked steps of a parameter (residuals of an inner derivative, say) are no longer it as
    # stored
    stacked = [None if o is None else o._replace(whole=False) for o in outs[carried:]]
    return [*carry, *stacked]


def _add_site(eqn, inputs, scans, sites) -> None:
    p = eqn.params
    s, a = (v.aval for v in eqn.invars[:2])
    params = tuple(o if o is not None and o.whole else None for o in inputs[2:])
    kernel = tuple(eqn.invars[2].aval.shape[p["stacked"] :])
    sites.append(Site(p["name"], p["geometry"], params, kernel, a, s, p["stacked"], scans))


def _refuse_taps(eqn, where: str) -> None:
    for body in bodies(eqn):
        for inner in getattr(body, "jaxpr", body).eqns:
            if inner.primitive is tap_p:
                raise ValueError(
                    f"layer {inner.params['name'] or inner.params['geometry'].kind!r} runs inside "
                    f"`{where}`, where its curvature has no meaning (how often it runs is not "
                    "known when tracing). Expected layers at top level or inside jit, remat, scan, "
                    "vmap. Use `jax.lax.scan`/`nn.scan` for a fixed number of steps, or move the "
                    "layer out of the branch."
                )
            _refuse_taps(inner, where)


def _note(inputs, primitive: str, consumers: dict[int, list[str]]) -> None:
    for origin in inputs:
        if origin is not None:
            consumers.setdefault(origin.leaf, []).append(primitive)


def _transposed(origin: Origin, permutation: Sequence[int]) -> Origin:
    n = len(permutation)
    before = [*range(-n, -len(origin.permutation)), *origin.permutation]
    now = [before[axis] for axis in permutation]
    while now and now[0] == -len(now):
        del now[0]
    return origin._replace(permutation=tuple(now))


def _sliced(origin: Origin | None, rank: int) -> Origin | None:
    """Inside a scan over it a value has lost its first axis; if that was no longer the first one
    stored, it is lost.
    """
    if origin is None:
        return None
    return origin._replace(
        depth=origin.depth + 1, whole=origin.whole and len(origin.permutation) < rank
    )
