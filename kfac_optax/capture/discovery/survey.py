"""Where a traced program uses its parameters, and which of these uses a tap accounts for."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from kfac_optax.capture.discovery.shifts import find_shift
from kfac_optax.capture.discovery.taps_inside import taps_in
from kfac_optax.capture.discovery.uses import Use, find_use
from kfac_optax.capture.geometry import ScaleShift
from kfac_optax.capture.jaxpr import example_axis
from kfac_optax.capture.jaxpr.calls import call_body, scan_body
from kfac_optax.capture.jaxpr.dependence import only_stopped
from kfac_optax.capture.jaxpr.scan_views import scan_views, views_behind_scan
from kfac_optax.capture.jaxpr.views import View, parameter_views, passed_on
from kfac_optax.capture.sites import STOPPED, Origin
from kfac_optax.capture.tap import tap_p

Path = tuple[int, ...]  # of an equation: its number in every jaxpr on the way to it


class Found(NamedTuple):
    """One use: where it is, and the bias behind it where it has one."""

    path: Path
    equation: str  # its primitive
    use: Use
    bias: tuple[Path, Origin, Use] | None  # where it is added, whose, and the use as seen there


class _Survey:
    """Uses in order of execution, and which of them (a mask of bits) a tap accounts for."""

    def __init__(self, examples: int | None, batched: bool):
        self.examples = examples
        self.batched = batched  # an argument has the examples
        self.found: list[Found] = []
        self.taps: dict[Path, tuple[int, set[int]]] = {}  # uses that each accounts for, its leaves
        self.idle: set[Path] = set()  # taps whose kernel is no parameter
        self.stopped: set[Path] = set()  # taps that no derivative comes back to
        self.carried = 0  # uses whose results a scan hands from step to step

    def add(self, found: Found) -> int:
        """Notes a use; its bit."""
        self.found.append(found)
        return 1 << (len(self.found) - 1)

    def claim(self, path: Path, leaves: set[int], between: int) -> int:
        """A tap knows of all uses of its parameters between its input and its output."""
        mine = 0
        for i, found in enumerate(self.found):
            # bits of the uses that its output depends on and its input does not
            bit = between & (1 << i)
            if found.use.origin.leaf in leaves:
                mine |= bit
        self.taps[path] = mine, leaves
        return mine

    def axes(self, known: example_axis.Axis, shape: Sequence[int]) -> list[int]:
        """Axes that may be the examples', where the program does not tell."""
        if known is not None and known != example_axis.UNKNOWN:
            return [known]
        if known is None and self.batched:
            return []
        return [i for i, n in enumerate(shape) if n == self.examples]


class _Known(NamedTuple):
    """What is known of a value."""

    view: View | None = None
    uses: int = 0  # a bit for every use it depends on, not through the tap that accounts for it
    axis: example_axis.Axis = None  # of the examples


def unclaimed(
    jaxpr: Any,
    leaves: int,
    examples: int | None,
) -> tuple[list[Found], set[Path]]:
    """Uses of parameters that no tap accounts for, and taps that account for a part only.

    Of a normalisation, a derivative reads what is between the scale and the tapped output: the tap
    sees the gradient of the output alone. Such a tap is of no use, its parameters' uses are.

    Args:
      jaxpr: its first `leaves` inputs are the parameter leaves.
      leaves: how many.
      examples: N.
    """
    axes = example_axis.of_inputs(jaxpr, leaves, examples)
    # of every argument the axis of its examples, if it has one
    batched = any(axis is not None for axis in axes)
    survey = _Survey(examples, batched)
    views = parameter_views(jaxpr, leaves)
    given = [_Known(view, 0, axis) for view, axis in zip(views, axes, strict=True)]
    leaking = 0
    # outputs that depend on a use past its tap: the tap saw a part of it
    for known in _survey(jaxpr, given, (), survey):
        leaking |= known.uses
    leaking |= survey.carried
    partial = {path for path, (uses, _) in survey.taps.items() if uses & leaking}
    partial |= survey.idle
    leaves_of = {path: leaves for path, (_, leaves) in survey.taps.items()}
    partial = _linked(partial, leaves_of)
    claimed = 0
    for path, (uses, _) in survey.taps.items():
        # what a tap sees as a whole it keeps
        if path not in partial:
            claimed |= uses
    free = [found for i, found in enumerate(survey.found) if not claimed & (1 << i)]
    return _seen_once(free), partial | survey.stopped


def _linked(partial: set[Path], taps: Mapping[Path, set[int]]) -> set[Path]:
    """These taps, and all that share a parameter with one of them, or with one of those.

    All taps of a parameter or none: its layer is one.
    """
    while True:
        # until no tap shares a parameter with one that goes
        touched: set[int] = set()
        for path in partial:
            touched |= taps[path]
        linked = {path for path, leaves in taps.items() if leaves & touched}
        if linked <= partial:
            return partial
        partial = partial | linked


def _seen_once(found: Sequence[Found]) -> list[Found]:
    """Without the uses of `table[:n]` that are those of its rows too: where it is a slice, and where
    the slice meets data.

    A slice is rows of a table, unless it is a kernel or the bias of one, or rows of the whole table
    are looked up as well.
    """
    biases = {x.bias[0] for x in found if x.bias is not None}
    tables, shared_out = set(), set()
    for x in found:
        leaf, part = x.use.origin.key
        kernel = not isinstance(x.use.geometry, ScaleShift)
        if x.equation == "gather" and part is None:
            tables.add(leaf)
        elif part is not None and (kernel or x.path in biases):
            shared_out.add(leaf)
    sliced = {x.use.origin.leaf for x in found if x.equation == "slice"}
    # a look-up in the table goes before other uses of its rows
    sliced -= shared_out - tables

    def counts(x: Found) -> bool:
        leaf, part = x.use.origin.key
        if x.equation == "slice":
            return leaf in sliced
        if leaf not in sliced or part is None:
            return True
        # rows of the table have all of its columns
        return part.sizes[1:] != part.shape[1:]

    return [x for x in found if counts(x)]


def _survey(
    jaxpr: Any,
    given: Sequence[_Known],
    path: Path,
    survey: _Survey,
) -> list[_Known]:
    """Notes all uses in a jaxpr; what is known of its outputs."""
    known: dict[Any, _Known] = dict(zip(jaxpr.invars, given, strict=True))
    readers = _readers(jaxpr)
    products: list[int] = []
    stopped = only_stopped(jaxpr, STOPPED)

    def look(v: Any) -> _Known:
        nothing = _Known()
        return nothing if isinstance(v, jex.Literal) else known.get(v, nothing)

    for i, eqn in enumerate(jaxpr.eqns):
        here = (*path, i)
        inputs = [look(v) for v in eqn.invars]
        if i in stopped:  # its rows have gradients of zero, which are none of a layer's
            survey.stopped.update(taps_in(eqn, here))
            known.update(zip(eqn.outvars, _plain(eqn, inputs, survey), strict=True))
            continue
        # None: neither a call, nor a scan, nor a parameter passed on
        outs = _entered_or_passed(eqn, inputs, here, survey)
        if outs is None or eqn.primitive.name == "slice":
            if outs is None:
                outs = _plain(eqn, inputs, survey)
            use = _use_of(eqn, inputs, outs[0], survey)
            if use is not None:
                # the bias is looked for when all views are known
                products.append(len(survey.found))
                bit = survey.add(Found(here, eqn.primitive.name, use, None))
                uses = outs[0].uses | bit
                outs = [outs[0]._replace(uses=uses)]
        known.update(zip(eqn.outvars, outs, strict=True))
    views_here = {v: x.view for v, x in known.items()}
    for number in products:
        found = survey.found[number]
        shift = find_shift(jaxpr, found.path[-1], found.use, views_here, readers)
        if shift is not None:
            bias = ((*path, shift.index), shift.origin, shift.use)
            survey.found[number] = found._replace(bias=bias)
    return [look(v) for v in jaxpr.outvars]


def _use_of(
    eqn: Any,
    inputs: Sequence[_Known],
    out: _Known,
    survey: _Survey,
) -> Use | None:
    """The use of a parameter that an equation is, if it is one."""
    views = [x.view for x in inputs]
    axes = survey.axes(out.axis, eqn.outvars[0].aval.shape) if any(views) else []
    return find_use(eqn, views, axes)


def _plain(
    eqn: Any,
    inputs: Sequence[_Known],
    survey: _Survey,
) -> list[_Known]:
    # bits of all operands
    uses = 0
    for x in inputs:
        uses |= x.uses
    axes = example_axis.behind(eqn, [x.axis for x in inputs], survey.examples)
    return [_Known(None, uses, axis) for axis in axes]


def _entered_or_passed(
    eqn: Any,
    inputs: Sequence[_Known],
    path: Path,
    survey: _Survey,
) -> list[_Known] | None:
    """What is known behind an equation that is no use itself; `None` where it may be one."""
    views = [x.view for x in inputs]
    if eqn.primitive is tap_p:
        leaves = {view.leaf for view in views[2:] if view is not None}
        if views[2] is None:
            survey.idle.add(path)
        s, a = inputs[:2]
        # between its input and its output
        mine = survey.claim(path, leaves, s.uses & ~a.uses)
        return [s._replace(view=None, uses=s.uses & ~mine)]
    if (body := call_body(eqn)) is not None:
        return _survey(body.jaxpr, inputs, path, survey)
    if eqn.primitive.name == "scan":
        return _survey_scan(eqn, inputs, path, survey)
    passed = passed_on(eqn, views)
    if passed is None:
        return None
    plain = _plain(eqn, inputs, survey)
    return [x._replace(view=view) for x, view in zip(plain, passed, strict=True)]


def _survey_scan(
    eqn: Any,
    inputs: Sequence[_Known],
    path: Path,
    survey: _Survey,
) -> list[_Known]:
    """What an earlier step has written is no part of this one, so one step says all."""
    closed, constants, carried = scan_body(eqn)
    first = constants + carried
    views = scan_views(eqn, [x.view for x in inputs])
    # one step sees a slice of what is scanned over
    slices = []
    for x in inputs[first:]:
        axis = example_axis.sliced(x.axis)
        slices.append(x._replace(axis=axis))
    steps = zip([*inputs[:first], *slices], views.inside, strict=True)
    inside = [x._replace(view=view) for x, view in steps]
    outs = _survey(closed.jaxpr, inside, path, survey)
    # a result that is carried cannot be told from what a later step makes
    for x in outs[:carried]:
        survey.carried |= x.uses
    behind = views_behind_scan(eqn, views, [x.view for x in outs])
    axes = [x.axis for x in outs[:carried]]
    axes += [example_axis.stacked(x.axis) for x in outs[carried:]]
    known = zip(behind, outs, axes, strict=True)
    return [_Known(view, x.uses, axis) for view, x, axis in known]


def _readers(jaxpr: Any) -> dict[Any, list[int]]:
    """Equations that read each value, -1 for a value that the jaxpr returns."""
    readers: dict[Any, list[int]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                readers.setdefault(v, []).append(i)
    for v in jaxpr.outvars:
        if not isinstance(v, jex.Literal):
            readers.setdefault(v, []).append(-1)
    return readers
