"""Static analysis of a traced function: where the taps are and, by data flow, whose parameters they
see.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from kfac_optax._types import Part
from kfac_optax.capture.geometry import Geometry, rows_shape
from kfac_optax.capture.jaxpr.calls import RULES, bodies, call_body, own_rule, scan_body
from kfac_optax.capture.jaxpr.code_lines import line_of, line_of_call
from kfac_optax.capture.jaxpr.dependence import dependence, may_hold_examples, only_stopped
from kfac_optax.capture.jaxpr.scan_views import scan_views, views_behind_scan
from kfac_optax.capture.jaxpr.views import View, parameter_views, passed_on
from kfac_optax.capture.tap import tap_p

# behind it a parameter is a constant: no use that a gradient or a statistic sees
STOPPED = "stop_gradient"


class Origin(NamedTuple):
    """Which parameter leaf the operand of a layer is: `depth` leading axes already taken by scans.

    `permutation` says which stored axes (from the end) its trailing axes are; `()` if none has
    moved. `part` is what of the leaf it is, `None` for all of it.
    """

    leaf: int
    depth: int = 0
    permutation: tuple[int, ...] = ()
    part: Part | None = None

    @property
    def key(self) -> tuple[int, Part | None]:
        """What one layer has."""
        return self.leaf, self.part


def origin_of(view: View, permutation: tuple[int, ...] = ()) -> Origin:
    """Of an operand that is a parameter."""
    return Origin(view.leaf, view.depth, permutation, view.part)


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
      found: whether it was found in the program, not tapped.
      swapped: whether it uses the layer's matrix the other way round, so that what its rows are is
        exchanged: the output's gradient is the input side's.
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
    found: bool = False
    swapped: bool = False
    varies: bool = True

    @property
    def bias(self) -> tuple[int, Part | None] | None:
        """Leaf, and part of it, of the bias operand, or `None`."""
        origin = self.params[1] if len(self.params) > 1 else None
        return None if origin is None else origin.key

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the axes along which the parameters differ."""
        # scans over parameters, then `vmap` over parameters
        scanned = tuple(n for n, rides in self.scans if rides)
        return scanned + self.a.shape[: self.stacked]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """`(N, *positions)` of one use."""
        a = self.a.shape[self.stacked :]
        s = self.s.shape[self.stacked :]
        return rows_shape(self.geometry, a, s)

    @property
    def loops(self) -> tuple[int, ...]:
        """Lengths of the scans in which the parameters are the same in every step."""
        return tuple(n for n, rides in self.scans if not rides)


class Consumer(NamedTuple):
    """An equation that reads a parameter: its primitive, or the rule it has, and its line of code."""

    name: str
    line: str = ""


Consumers = dict[int, list[Consumer]]


class Analysis(NamedTuple):
    """Sites in order of execution, and for every parameter leaf what else consumes it."""

    sites: tuple[Site, ...]
    consumers: Consumers

    def names(self, leaf: int) -> list[str]:
        """What consumes a leaf."""
        return [consumer.name for consumer in self.consumers.get(leaf, [])]


def count_taps(jaxpr: Any) -> int:
    """Number of taps in a jaxpr, bodies included."""
    return sum(map(count_taps_of, jaxpr.eqns))


def count_taps_of(eqn: Any) -> int:
    """Taps in one equation; those inside a call with its own derivative rule are none."""
    if eqn.primitive is tap_p:
        return 1
    # a derivative rule of the user's own hides what is inside
    if eqn.primitive.name in RULES:
        return 0
    return sum(map(count_taps, bodies(eqn)))


def analyse(jaxpr: Any, leaves: int) -> Analysis:
    """Finds all sites of a jaxpr whose first `leaves` inputs are the parameter leaves.

    Raises:
      ValueError: a tapped layer runs inside `cond`, `while_loop` or another primitive where it has
        no meaning.
    """
    sites: list[Site] = []
    consumers: Consumers = {}
    # what each value is of a parameter, if it is one as stored
    views = parameter_views(jaxpr, leaves)
    _note(_walk(jaxpr, views, (), sites, consumers), "the prediction itself", consumers)
    # arrays among the arguments, but no keys: what may hold examples
    arguments = jaxpr.invars[leaves:]
    data = [False] * leaves + [may_hold_examples(v.aval) for v in arguments]
    flags: list[bool] = []
    dependence(jaxpr, data, flags)
    # a model that closes over its batch shows no difference between data and constants
    sites = [
        site._replace(varies=varies or not any(data))
        for site, varies in zip(sites, flags, strict=True)
    ]
    return Analysis(tuple(sites), consumers)


def _walk(
    jaxpr: Any,
    views: Sequence[View | None],
    scans: tuple,
    sites: list[Site],
    consumers: Consumers,
    line: str = "",
) -> list[View | None]:
    known: dict[Any, View | None] = dict(zip(jaxpr.invars, views, strict=True))

    # literals are no parameters
    def source(v: Any) -> View | None:
        return None if isinstance(v, jex.Literal) else known.get(v)

    def note(views: Sequence[View | None], name: str, eqn: Any) -> None:
        if any(views):  # lines are looked up for these only
            _note(views, name, consumers, line or line_of(eqn))

    stopped = only_stopped(jaxpr, STOPPED)
    for i, eqn in enumerate(jaxpr.eqns):
        inputs = [source(v) for v in eqn.invars]
        outputs: Sequence[View | None] = [None] * len(eqn.outvars)
        # a tap; then calls and scans, whose bodies are walked; then what passes a parameter on
        if eqn.primitive is tap_p:
            _add_site(eqn, inputs, scans, sites)
            if sites[-1].found and sites[-1].name == "slice":  # read by no other equation
                note([inputs[0]], "slice", eqn)
        elif i in stopped and not count_taps_of(eqn):
            note(inputs, STOPPED, eqn)
        elif (body := call_body(eqn)) is not None:
            inside = line_of_call(eqn, body.jaxpr, line)
            outputs = _walk(body.jaxpr, inputs, scans, sites, consumers, inside)
        elif eqn.primitive.name == "scan":
            outputs = _walk_scan(eqn, inputs, scans, sites, consumers)
        elif (rule := own_rule(eqn)) is not None:
            note(inputs, rule, eqn)
        elif eqn.primitive.name == STOPPED:
            note(inputs, STOPPED, eqn)
        elif (passed := passed_on(eqn, inputs)) is not None:
            outputs = passed
        else:
            _refuse_taps(eqn, eqn)
            note(inputs, eqn.primitive.name, eqn)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [source(v) for v in jaxpr.outvars]


def _walk_scan(
    eqn,
    inputs,
    scans,
    sites,
    consumers,
) -> list[View | None]:
    closed, _, carried = scan_body(eqn)
    length, depth = eqn.params["length"], len(scans)
    given = scan_views(eqn, inputs)
    _note(given.spent, "scan", consumers, line_of(eqn))
    # the scan's place in `scans` is its length until all its sites are known
    start = len(sites)
    outs = _walk(closed.jaxpr, given.inside, (*scans, length), sites, consumers)
    carries = zip(outs[:carried], given.kept, strict=True)
    written = [view for view, keep in carries if not keep]
    _note(written, "scan", consumers, line_of(eqn))
    # now it is known for each layer whether this scan goes over its parameters
    for i in range(start, len(sites)):
        leaf = sites[i].params[0]
        marked = list(sites[i].scans)
        over_it = leaf is not None and leaf.leaf in given.riding
        marked[depth] = (length, over_it)
        sites[i] = sites[i]._replace(scans=tuple(marked))
    return views_behind_scan(eqn, given, outs)


def _add_site(eqn, inputs, scans, sites) -> None:
    p = eqn.params
    s, a = (v.aval for v in eqn.invars[:2])
    if p["origins"]:  # found in the program, which knows more than the operands say
        params, kernel = p["origins"], p["kernel"]
    else:
        params = tuple(map(_origin, inputs[2:]))
        shape = eqn.invars[2].aval.shape
        kernel = tuple(shape[p["stacked"] :])
    found = bool(p["origins"])
    site = Site(
        name=p["name"],
        geometry=p["geometry"],
        params=params,
        kernel=kernel,
        a=a,
        s=s,
        stacked=p["stacked"],
        scans=scans,
        found=found,
    )
    sites.append(site)


def _origin(view: View | None) -> Origin | None:
    """Which parameter an operand is, if it is a whole one as stored."""
    if view is None or not view.whole:
        return None
    return origin_of(view, view.permutation)


def _refuse_taps(eqn, outer) -> None:
    # taps in a branch or a loop of unknown length
    for body in bodies(eqn):
        for inner in getattr(body, "jaxpr", body).eqns:
            if inner.primitive is tap_p:
                line = line_of(outer)
                place = f" ({line})" if line else ""
                raise ValueError(
                    f"layer {inner.params['name'] or inner.params['geometry'].kind!r} runs inside "
                    f"`{outer.primitive.name}`{place}, where its curvature has no meaning (how often it runs is not "
                    "known when tracing). Expected layers at top level or inside jit, remat, scan, "
                    "vmap. Use `jax.lax.scan`/`nn.scan` for a fixed number of steps, or move the "
                    "layer out of the branch."
                )
            _refuse_taps(inner, outer)


def _note(
    inputs,
    name: str,
    consumers: Consumers,
    line: str = "",
) -> None:
    for view in inputs:
        if view is not None and 0 not in view.stored:  # what has no numbers is not used
            consumers.setdefault(view.leaf, []).append(Consumer(name, line))
