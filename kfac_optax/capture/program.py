"""Taps that a traced program is given where it uses a parameter and no front end has seen it.

Every equation that is linear in a parameter (a product, a convolution, a look-up, a scale, a
shift) is a layer's use: `x @ w` written by hand, and what a derivative of the network makes of its
layers, `x' W` of a tangent and `g W^T` of a cotangent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from kfac_optax.capture.calls import bodies
from kfac_optax.capture.ownership import own_biases
from kfac_optax.capture.rewriting import rewritten, with_body
from kfac_optax.capture.sites import Origin
from kfac_optax.capture.survey import Found, Path, unclaimed
from kfac_optax.capture.tap import tap_p
from kfac_optax.capture.uses import Use


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
    around = {path[:n] for path in taps for n in range(1, len(path))}
    return jex.ClosedJaxpr(_tapped(closed.jaxpr, (), taps, around), closed.consts)


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
        use, path, origins = found.use, found.path, (found.use.origin,)
        if found.path in own:
            path, bias, use = own[found.path]
            origins = (use.origin, bias)
        # two uses meet in one equation only by mistake
        if path in taps:
            raise AssertionError(f"two layers claim the equation at {path}")
        taps[path] = _Placement(use, found.equation, found.path[-1], origins)
    return taps


def _biases_behind(free: Sequence[Found]) -> dict[Path, tuple[Path, Origin, Use]]:
    """The bias behind each product: one of each kernel, which nothing else has or adds."""
    paths = {found.path for found in free}
    wanted = {x.path: x.bias for x in free if x.bias is not None and x.bias[0] in paths}
    first: dict[Any, Any] = {}
    for _, bias, use in wanted.values():
        # the first bias that a kernel has, read the same way round
        first.setdefault(use.origin.key, (bias.key, _way_round(use)))
    wanted = {
        path: (where, bias, use)
        for path, (where, bias, use) in wanted.items()
        if first[use.origin.key] == (bias.key, _way_round(use))
    }
    own = own_biases((use.origin.key, bias.key) for _, bias, use in wanted.values())
    added = {where for where, _, _ in wanted.values()}
    # a parameter that is also added elsewhere is a layer of its own
    elsewhere = {x.use.origin.key for x in free if x.path not in added}
    return {
        path: (where, bias, use)
        for path, (where, bias, use) in wanted.items()
        if use.origin.key in own and bias.key not in elsewhere
    }


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
        eqn = old.replace(invars=list(map(name, old.invars))) if names else old
        if here in taps:
            placement = taps[here]
            if placement is None:
                names[eqn.outvars[0]] = eqn.invars[0]
                continue
            # operands of the use itself, also where the tap is behind the bias
            source = jaxpr.eqns[placement.source]
            equations += _with_tap(eqn, placement, list(map(name, source.invars)))
        elif here in around:
            equations.append(_entered(eqn, here, taps, around))
        else:
            equations.append(eqn)
    return jaxpr.replace(eqns=equations, outvars=list(map(name, jaxpr.outvars)))


def _entered(eqn: Any, path: Path, taps: _Taps, around: Set[Path]) -> Any:
    (body,) = bodies(eqn)
    return with_body(eqn, _tapped(getattr(body, "jaxpr", body), path, taps, around))


def _with_tap(
    eqn: Any,
    placement: _Placement,
    operands: Sequence[Any],
) -> Iterator[Any]:
    """The equation, and its output handed on through a tap, given the operands of the use."""
    use, (out,) = placement.use, eqn.outvars
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
            primitive=tap_p, invars=[s, a], outvars=[out], params=params, effects=set()
        )
        return
    yield from rewritten(_arranged(use, params), [s, a], out, eqn.source_info)


# axes as layers have them, and back behind the tap
def _arranged(use: Use, params: Mapping[str, Any]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def tap(s: jax.Array, a: jax.Array) -> jax.Array:
        assert use.arrange is not None
        return use.restore(tap_p.bind(*use.arrange(s, a), **params))

    return tap
