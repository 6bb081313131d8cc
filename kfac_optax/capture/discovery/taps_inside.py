"""Where in a program taps are."""

from collections.abc import Iterator
from typing import Any

from kfac_optax.capture.jaxpr.calls import bodies
from kfac_optax.capture.sites import count_taps_of
from kfac_optax.capture.tap import tap_p


def taps_in(eqn: Any, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Where an equation is a tap, or has some inside."""
    if eqn.primitive is tap_p:
        yield path
    if count_taps_of(eqn):
        for body in bodies(eqn):
            for i, inner in enumerate(getattr(body, "jaxpr", body).eqns):
                yield from taps_in(inner, (*path, i))
