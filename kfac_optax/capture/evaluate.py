"""Evaluates a traced function again with a probe at every tap; a probe's cotangent is the layer's
statistic.

Tap-free runs of equations are handed back to JAX as whole jaxprs. Only what contains a tap is
entered: calls are inlined, `remat` is re-wrapped, a `scan` is rebuilt so that probes ride along
with the layers it scans over (the statistics come out stacked) and stay constant over time (the
statistics are added up).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from kfac_optax._layout import zeros_of_type
from kfac_optax._types import PyTree
from kfac_optax.capture.jaxpr.calls import call_body, scan_body
from kfac_optax.capture.sites import Site, count_taps_of
from kfac_optax.capture.tap import tap_p


class Zeros(NamedTuple):
    """Arguments of a probe: `summed` is added up over steps in which the layer is reused, `rows` is
    kept apart.
    """

    summed: PyTree
    rows: PyTree


# What a probe measures from one use, `(a, g, extra, inverse) -> Zeros` of statistics.
Measure = Callable[[jax.Array, jax.Array, PyTree, PyTree], Zeros]


class Probe(NamedTuple):
    """What a probe is given: arguments whose cotangents are the statistics, and what its block
    holds.

    Both ride along with scans over layers; over time the inverse stays the same.
    """

    zeros: Zeros
    inverse: PyTree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(
    measure: Measure,
    s: jax.Array,
    a: jax.Array,
    extra: PyTree,
    inverse: PyTree,
    zeros: Zeros,
) -> jax.Array:
    # s itself: a probe leaves values as they are
    return s


def _probe_forward(measure, s, a, extra, inverse, zeros):
    return s, (a, extra, inverse)


def _probe_backward(measure, residuals, g):
    # nothing for a, extra and inverse; the statistics as the cotangent of `zeros`
    a, extra, inverse = residuals
    return g, None, None, None, measure(a, g, extra, inverse)


_probe.defvjp(_probe_forward, _probe_backward)


def as_cotangent(x: jax.Array) -> jax.Array:
    """Rows that a probe hands back: tokens as floats, since a cotangent cannot be an integer (exact
    below 2^24).
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.float32)
    return x


def from_cotangent(site: Site, rows: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    """Inverse of `as_cotangent` for the rows `(a, g)` of a site."""
    a, g = rows
    if jnp.issubdtype(site.a.dtype, jnp.integer):
        a = a.astype(jnp.int32)
    return a, g


def make_zeros(
    site: Site,
    measure: Measure,
    extra: PyTree,
    inverse: PyTree,
) -> Zeros:
    """Zeros in the shape of what `measure` makes of a site, with the axes of enclosing scans in
    front.
    """
    # over layers of a scan statistics stay apart, over steps in time they are added up
    rides = [n for n, over_layers in site.scans if over_layers]
    measure = _over_stack(site, measure)

    def inside(
        a: jax.Array,
        s: jax.Array,
        extra: PyTree,
        inverse: PyTree,
    ) -> Zeros:
        # [layers, ...] to those of one
        first = (0,) * len(rides)
        one_layer = jax.tree.map(lambda x: x[first], inverse)
        return measure(a, s, extra, one_layer)

    shapes = jax.eval_shape(inside, site.a, site.s, extra, inverse)
    # rows stay apart in both
    lengths = [n for n, _ in site.scans]
    summed = jax.tree.map(lambda x: zeros_of_type(x, rides), shapes.summed)
    rows = jax.tree.map(lambda x: zeros_of_type(x, lengths), shapes.rows)
    return Zeros(summed, rows)


def evaluate(
    closed: Any,
    inputs: Sequence[Any],
    sites: Sequence[Site],
    measures: Sequence[Measure | None],
    extra: PyTree,
    probes: Sequence[Probe | None],
) -> list[Any]:
    """Flat outputs of a closed jaxpr, with a probe where a site has a measure (`None`: the tap is
    dropped).
    """
    run = _Run(tuple(sites), tuple(measures), extra)
    everything = range(len(sites))
    return _evaluate(run, closed.jaxpr, closed.consts, inputs, everything, probes, 0)


def _over_stack(site: Site, measure: Measure) -> Measure:
    """The measure of one layer mapped over a stack of layers, each with an inverse of its own."""
    # stacked axes are in front, of a, g and the inverse
    for _ in range(site.stacked):
        measure = jax.vmap(measure, in_axes=(0, 0, None, 0))
    return measure


class _Run(NamedTuple):
    sites: tuple[Site, ...]
    measures: tuple[Measure | None, ...]
    extra: PyTree


def _evaluate(run, jaxpr, consts, inputs, indices, probes, depth) -> list[Any]:
    """`indices` are the sites inside this jaxpr, `probes` what their probes are given, `depth` the
    enclosing scans.
    """
    # values of the jaxpr, by the variable that holds them
    variables = [*jaxpr.constvars, *jaxpr.invars]
    env = dict(zip(variables, [*consts, *inputs], strict=True))
    queue = iter(zip(indices, probes, strict=True))
    pending: list[Any] = []

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    # what has no tap is evaluated in one piece
    def flush() -> None:
        if pending:
            run_equations(jaxpr, pending, env)
            pending.clear()

    for eqn in jaxpr.eqns:
        taps = count_taps_of(eqn)
        if not taps:
            pending.append(eqn)
            continue
        flush()
        values = [read(v) for v in eqn.invars]
        # taps come in order of execution, and so do the sites
        inside, mine = _take(queue, taps)
        if eqn.primitive is tap_p:
            s, a = values[:2]
            outs = [_place(run, inside[0], s, a, mine[0])]
        elif eqn.primitive.name == "scan":
            outs = _scan(run, eqn, values, inside, mine, depth)
        else:
            outs = _call(run, eqn, values, inside, mine, depth)
        env.update(zip(eqn.outvars, outs, strict=True))
    flush()
    return [read(v) for v in jaxpr.outvars]


def _take(queue: Iterator, n: int) -> tuple[list[int], list[Any]]:
    pairs = [next(queue) for _ in range(n)]
    # as many as the taps inside, one after another
    return [i for i, _ in pairs], [probe for _, probe in pairs]


def _place(
    run: _Run,
    index: int,
    s: Any,
    a: Any,
    probe: Probe | None,
) -> Any:
    measure = run.measures[index]
    if measure is None or probe is None:
        return s
    measure = _over_stack(run.sites[index], measure)
    return _probe(measure, s, a, run.extra, probe.inverse, probe.zeros)


def _call(run, eqn, values, inside, probes, depth) -> list[Any]:
    body = call_body(eqn)
    assert body is not None, eqn.primitive

    # calls are looked into; jit would hide their taps
    def call(values, probes):
        return _evaluate(run, body.jaxpr, body.consts, values, inside, probes, depth)

    if "prevent_cse" in eqn.params:  # remat: recompute in the backward pass as the user asked
        options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
        call = jax.checkpoint(call, **options)
    return call(values, probes)


def _scan(run, eqn, values, inside, probes, depth) -> list[Any]:
    params = eqn.params
    closed, constants, carried = scan_body(eqn)
    first = constants + carried
    # of each tap inside: whether this scan is over layers, or over steps in time
    over_layers = [run.sites[i].scans[depth][1] for i in inside]
    pairs = list(zip(probes, over_layers, strict=True))
    riding = [_riding(probe, layered) for probe, layered in pairs]

    def body(carry, xs):
        slices, ride = xs
        given = zip(pairs, ride, strict=True)
        merged = [_in_step(probe, one, layered) for (probe, layered), one in given]
        step = [*values[:constants], *carry, *slices]
        outs = _evaluate(run, closed.jaxpr, closed.consts, step, inside, merged, depth + 1)
        return outs[:carried], outs[carried:]

    # [steps, ...] in front of what rides
    carry, ys = jax.lax.scan(
        body,
        values[constants:first],
        (values[first:], riding),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _riding(probe: Probe | None, layered: bool) -> Probe | None:
    """What of a probe rides along with a scan, over layers or over steps in time."""
    # zeros and inverses of layers are scanned over; of one layer only the rows are
    if probe is None or layered:
        return probe
    rows = Zeros(None, probe.zeros.rows)
    return Probe(rows, None)


def _in_step(probe: Probe | None, ride: Probe, layered: bool) -> Probe | None:
    """What the probe of a layer is given in one step of a scan."""
    if probe is None or layered:
        return ride
    # one layer: zeros from outside, to which every step adds; only rows are kept apart
    zeros = Zeros(probe.zeros.summed, ride.zeros.rows)
    return Probe(zeros, probe.inverse)


def run_equations(jaxpr: Any, eqns: list[Any], env: dict[Any, Any]) -> None:
    """Evaluates tap-free equations as one jaxpr, with JAX's own rules for everything in it."""
    # inputs are what others write, outputs all that is written: XLA drops what nobody reads
    written: list[Any] = []
    read: list[Any] = []
    for eqn in eqns:
        written += eqn.outvars
        read += [v for v in eqn.invars if not isinstance(v, jex.Literal)]
    made = set(written)
    used = list(dict.fromkeys(v for v in read if v not in made))
    outs = [v for v in written if not isinstance(v, jex.DropVar)]
    part = jaxpr.replace(
        constvars=[],
        invars=used,
        outvars=outs,
        eqns=list(eqns),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    compute = jex.jaxpr_as_fun(jex.ClosedJaxpr(part, []))
    values = compute(*[env[v] for v in used])
    env.update(zip(outs, values, strict=True))
