"""A traced model run with probes: its pullbacks, and what sites measure in them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from kfac_optax._types import PyTree
from kfac_optax.capture.evaluate import (
    Measure,
    Probe,
    Zeros,
    as_cotangent,
    evaluate,
    from_cotangent,
    make_zeros,
)
from kfac_optax.capture.layers import Traced
from kfac_optax.capture.sites import Site


class Pulled(NamedTuple):
    """Result of one pullback: statistics of every site, and gradients of the leaves asked for."""

    sites: Sequence[Zeros | None]
    leaves: dict[str, jax.Array]


class Asked(NamedTuple):
    """What a pass through the model is to measure.

    Attributes:
      measures: one for every site, or `None`.
      inverses: what each of them reads, `[*stack, groups, ...]`, or `None`.
      extra: what all of them read.
      names: of the leaves whose gradients are wanted too.
    """

    measures: Sequence[Measure | None]
    inverses: Sequence[PyTree]
    extra: PyTree
    names: Sequence[str]


# `asked -> (pull, heads)`, `pull(cotangents) -> Pulled`.
Linearize = Callable[[Asked], tuple[Callable[[Any], Pulled], Any]]


def linearize_now(
    traced: Traced,
    inputs: Sequence[Any],
    outputs: Callable[[PyTree], tuple[Any, Any]],
) -> Linearize:
    """Runs the model forward with probes; statistics are computed on the fly in the backward pass."""

    def linearize(asked: Asked):
        measures, inverses, extra, names = asked
        # cotangents of the probes are the statistics: zeros of their types stand in for them
        zeros = zeros_of_sites(traced, measures, extra, inverses)
        # inputs of the jaxpr whose own gradients are asked for
        positions = {name: traced.names.index(name) for name in names}
        leaves = {name: inputs[i] for name, i in positions.items()}

        def run(zeros, leaves):
            mine = list(inputs)
            for name, leaf in leaves.items():
                mine[positions[name]] = leaf
            probes = probes_of(zeros, inverses)
            flat = evaluate(traced.jaxpr, mine, traced.sites, measures, extra, probes)
            return outputs(as_returned(traced, flat))

        # one forward pass, as many pullbacks as there are cotangents
        _, pull, heads = jax.vjp(run, zeros, leaves, has_aux=True)
        return (lambda cotangents: Pulled(*pull(cotangents))), heads

    return linearize


def zeros_of_sites(
    traced: Traced,
    measures: Sequence[Measure | None],
    extra: PyTree,
    inverses: Sequence[PyTree],
) -> list[Zeros | None]:
    """Zeros of what each measure gives, in whose place the statistics come back; `None` for sites
    that are not measured.
    """
    zeros = []
    for site, measure, inverse in zip(traced.sites, measures, inverses, strict=True):
        found = None if measure is None else make_zeros(site, measure, extra, inverse)
        zeros.append(found)
    return zeros


def probes_of(zeros: Sequence[Zeros | None], inverses: Sequence[PyTree]) -> list[Probe | None]:
    """A probe for every site that is measured."""
    pairs = zip(zeros, inverses, strict=True)
    return [None if zero is None else Probe(zero, inverse) for zero, inverse in pairs]


def as_returned(traced: Traced, flat: Sequence[Any]) -> PyTree:
    """Outputs of the jaxpr in the tree that the function returns."""
    return jax.tree.unflatten(jax.tree.structure(traced.out_shape), flat)


def rows_measure(
    a: jax.Array,
    g: jax.Array,
    extra: PyTree,
    inverse: PyTree,
) -> Zeros:
    """Keeps the rows themselves, for a forward pass that is shared before it is known what to
    measure.
    """
    return Zeros(None, (as_cotangent(a), g))


def apply_to_rows(
    site: Site,
    measure: Measure,
    rows: tuple[jax.Array, jax.Array],
    extra: PyTree,
    inverse: PyTree,
) -> Zeros:
    """The statistics of a site from its stored rows, as its probe would have measured them."""
    # axes of the rows from the inside out: stack, then scans, in some of which parameters stay the
    # same
    for _ in range(site.stacked):
        measure = jax.vmap(measure, in_axes=(0, 0, None, 0))
    for _, over_layers in reversed(site.scans):
        of_inverse = 0 if over_layers else None
        measure = jax.vmap(measure, in_axes=(0, 0, None, of_inverse))
    a, g = from_cotangent(site, rows)
    measured = measure(a, g, extra, inverse)
    # uses in the steps of a scan over time add up
    loops = [i for i, (_, over_layers) in enumerate(site.scans) if not over_layers]
    summed = jax.tree.map(lambda x: x.sum(tuple(loops)), measured.summed)
    return Zeros(summed, measured.rows)
