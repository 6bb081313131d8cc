"""Taps that a traced program is given where it uses a parameter and no front end has seen it.

Every equation that is linear in a parameter (a product, a convolution, a look-up, a scale, a
shift) is a layer's use: `x @ w` written by hand, and what a derivative of the network makes of its
layers, `x' W` of a tangent and `g W^T` of a cotangent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from kfac_optax.capture.discovery.survey import Found, Path, unclaimed
from kfac_optax.capture.discovery.uses import Use
from kfac_optax.capture.jaxpr.calls import bodies
from kfac_optax.capture.jaxpr.rewriting import rewritten, with_body
from kfac_optax.capture.ownership import own_biases
from kfac_optax.capture.sites import Origin
from kfac_optax.capture.tap import tap_p


def with_taps(closed: Any, leaves: int, examples: int | None) -> Any:
    """The closed jaxpr with a tap at every use of a parameter that no tap accounts for.

    Without such uses it is handed back as it is.

    Args:
      closed: its first `leaves` inputs are the parameter leaves.
      leaves: how many.
      examples: N, for which axis of the rows comes first.
    """
    free, partial = unclaimed(closed.jaxpr, leaves, examples)
    # None for a tap that sees a part of the uses only: it makes way for those of the equations
    taps = _placements(free) | dict.fromkeys(partial)
    if not taps:
        return closed
    # calls and scans on the way to one
    around: set[Path] = set()
    for path in taps:
        around.update(path[:n] for n in range(1, len(path)))
    tapped = _tapped(closed.jaxpr, (), taps, around)
    return jex.ClosedJaxpr(tapped, closed.consts)


class _Placement(NamedTuple):
    """A tap behind an equation, for the use in the equation at `source`."""

    use: Use
    equation: str
    source: int
    origins: tuple[Origin, ...]


_Taps = Mapping[Path, _Placement | None]  # None: the tap that is there is dropped


def _placements(free: Sequence[Found]) -> dict[Path, _Placement]:
    """Where taps go: behind the bias of a product where that has one, else behind the product."""
    own = _biases_behind(free)
    # additions that are a bias have no tap of their own
    spent = {where for where, _, _ in own.values()}
    taps: dict[Path, _Placement] = {}
    for found in free:
        if found.path in spent:
            continue
        use, path = found.use, found.path
        origins: tuple[Origin, ...] = (use.origin,)
        if path in own:
            path, bias, use = own[path]
            origins = (use.origin, bias)
        # two uses meet in one equation only by mistake
        if path in taps:
            raise AssertionError(f"two layers claim the equation at {path}")
        source = found.path[-1]
        taps[path] = _Placement(use, found.equation, source, origins)
    return taps


def _biases_behind(free: Sequence[Found]) -> dict[Path, tuple[Path, Origin, Use]]:
    """The bias behind each product: one of each kernel, which nothing else has or adds."""
    paths = {found.path for found in free}
    # what each kernel has behind it first: its bias, read one way round
    first: dict[Any, Any] = {}
    wanted: dict[Path, tuple[Path, Origin, Use]] = {}
    for found in free:
        if found.bias is None or found.bias[0] not in paths:
            continue
        _, bias, use = found.bias
        mine = bias.key, _way_round(use)
        if first.setdefault(use.origin.key, mine) == mine:
            wanted[found.path] = found.bias
    pairs = [(use.origin.key, bias.key) for _, bias, use in wanted.values()]
    own = own_biases(pairs)
    added = {where for where, _, _ in wanted.values()}
    # a parameter that is also added elsewhere is a layer of its own
    elsewhere = {x.use.origin.key for x in free if x.path not in added}
    kept = {}
    for path, (where, bias, use) in wanted.items():
        if use.origin.key in own and bias.key not in elsewhere:
            kept[path] = where, bias, use
    return kept


def _way_round(use: Use) -> tuple[int, ...]:
    """Which of its axes a kernel sums over: `x W` or `x W^T`."""
    # geometries other than products have one way only
    return getattr(use.geometry, "kernel", ())


def _tapped(jaxpr: Any, path: Path, taps: _Taps, around: Set[Path]) -> Any:
    """The jaxpr with its taps, those in the calls and scans `around` some too."""
    equations: list[Any] = []
    names: dict[Any, Any] = {}  # of values behind taps that are dropped

    def name(v: Any) -> Any:
        return v if isinstance(v, jex.Literal) else names.get(v, v)

    for i, old in enumerate(jaxpr.eqns):
        # the path of an equation is its number in every jaxpr on the way
        here = (*path, i)
        eqn = old
        if names:
            eqn = old.replace(invars=list(map(name, old.invars)))
        if here in taps:
            placement = taps[here]
            if placement is None:
                names[eqn.outvars[0]] = eqn.invars[0]
                continue
            # operands of the use itself, also where the tap is behind the bias
            source = jaxpr.eqns[placement.source]
            operands = list(map(name, source.invars))
            equations += _with_tap(eqn, placement, operands)
        elif here in around:
            equations.append(_entered(eqn, here, taps, around))
        else:
            equations.append(eqn)
    outs = list(map(name, jaxpr.outvars))
    return jaxpr.replace(eqns=equations, outvars=outs)


def _entered(eqn: Any, path: Path, taps: _Taps, around: Set[Path]) -> Any:
    (body,) = bodies(eqn)
    # closed or not, by the kind of call
    inner = getattr(body, "jaxpr", body)
    return with_body(eqn, _tapped(inner, path, taps, around))


def _with_tap(
    eqn: Any,
    placement: _Placement,
    operands: Sequence[Any],
) -> Iterator[Any]:
    """The equation, and its output handed on through a tap, given the operands of the use."""
    use = placement.use
    (out,) = eqn.outvars
    # the use's own output is s; what read it before reads the tap's
    s = jex.Var(out.aval)
    a = s if use.other is None else operands[use.other]
    params = {
        "geometry": use.geometry,
        "name": placement.equation,
        "stacked": 0,
        "origins": placement.origins,
        "kernel": use.kernel,
    }
    yield eqn.replace(outvars=[s])
    if use.arrange is None:
        yield eqn.replace(
            primitive=tap_p,
            invars=[s, a],
            outvars=[out],
            params=params,
            effects=set(),
        )
        return
    # axes as layers have them, and back behind the tap
    tap = _arranged(use, params)
    yield from rewritten(tap, [s, a], out, eqn.source_info)


def _arranged(
    use: Use,
    params: Mapping[str, Any],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def tap(s: jax.Array, a: jax.Array) -> jax.Array:
        assert use.arrange is not None
        operands = use.arrange(s, a)
        return use.restore(tap_p.bind(*operands, **params))

    return tap
