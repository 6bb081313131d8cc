"""Which heads of a prediction each tapped call serves, by data flow, and how many examples it has."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from kfac_optax.capture.jaxpr.calls import call_body
from kfac_optax.capture.layers import RANDOM_SIGNS, Traced
from kfac_optax.capture.sites import Site, count_taps_of
from kfac_optax.estimators.heads import Kind, count_examples

Heads = frozenset[int]
_NONE: Heads = frozenset()


class Served(NamedTuple):
    """What a site computes for the heads.

    Attributes:
      head: the only head that depends on it, by its order in the tree; `None` if several do.
      examples: length of the batch of those heads; of the first head where they disagree, or
        where the rows of the site are not those examples.
    """

    head: int | None
    examples: int


def served(
    traced: Traced,
    leaves: Sequence[int],
    examples: Sequence[int],
) -> list[Served]:
    """What every site serves.

    Two calls of the same parameters, one for the residual inside a domain and one for its
    boundary, are two uses of each layer: the first head depends on one of them, the second on the
    other.

    Args:
      traced: the model.
      leaves: number of arrays of each head, in the order in which the model returns them; what it
        returns behind them belongs to no head.
      examples: of each head, axis 0 of its terms.
    """
    # outputs of the model: arrays of each head, then what belongs to none
    jaxpr = traced.jaxpr.jaxpr
    owners: list[Heads] = []
    for head, count in enumerate(leaves):
        owners += [frozenset([head])] * count
    others = len(jaxpr.outvars) - len(owners)
    owners += [_NONE] * others
    heads_of_taps, _ = _walk_back(jaxpr, owners)
    pairs = zip(traced.sites, heads_of_taps, strict=True)
    return [_served(site.row_shape, heads, examples) for site, heads in pairs]


def _served(
    rows: tuple[int, ...],
    heads: Heads,
    examples: Sequence[int],
) -> Served:
    # rows that are the examples of all its heads, which agree on their number
    lengths = {examples[head] for head in heads}
    own = len(lengths) == 1 and rows[:1] == tuple(lengths)
    (head,) = heads if len(heads) == 1 else (None,)
    return Served(head, lengths.pop() if own else examples[0])


def _walk_back(jaxpr: Any, outputs: Sequence[Heads]) -> tuple[list[Heads], list[Heads]]:
    """The heads that need each tap, in order of execution, and those that need each input.

    `outputs` are the heads that each output of the jaxpr belongs to.
    """
    needed: dict[Any, Heads] = {}
    taps: list[Heads] = []  # backwards

    def need(variables: Sequence[Any], heads: Sequence[Heads]) -> None:
        for v, mine in zip(variables, heads, strict=True):
            if not isinstance(v, jex.Literal):
                needed[v] = needed.get(v, _NONE) | mine

    need(jaxpr.outvars, outputs)
    # from outputs to inputs, so that every reader is seen before what it reads
    for eqn in reversed(jaxpr.eqns):
        out = [needed.get(v, _NONE) for v in eqn.outvars]
        together = _NONE.union(*out)
        if (body := call_body(eqn)) is not None:
            inside, inputs = _walk_back(body.jaxpr, out)
            taps.extend(reversed(inside))
            need(eqn.invars, inputs)
            continue
        # of a scan, whatever one step carries may reach every output
        taps.extend([together] * count_taps_of(eqn))
        need(eqn.invars, [together] * len(eqn.invars))
    of_inputs = [needed.get(v, _NONE) for v in jaxpr.invars]
    return taps[::-1], of_inputs


def rows_of_own_heads(traced: Traced, served: Sequence[Served]) -> Traced:
    """The model without the note of random signs on layers whose rows are examples after all, of
    the heads that they serve.
    """
    # a layer keeps the note where one of its uses has other rows
    pairs = zip(traced.sites, traced.owner, served, strict=True)
    apart = {owner for site, owner, s in pairs if not _of_examples(site, s.examples)}
    layers = []
    for i, layer in enumerate(traced.layers):
        if i not in apart:
            notes = tuple(note for note in layer.notes if note != RANDOM_SIGNS)
            layer = dataclasses.replace(layer, notes=notes)
        layers.append(layer)
    coverage = dataclasses.replace(traced.layers, layers=tuple(layers))
    return traced._replace(layers=coverage)


def _of_examples(site: Site, examples: int) -> bool:
    # a table of positions may happen to have as many rows
    return site.varies and site.row_shape[:1] == (examples,)


def served_of(
    kind: Kind,
    traced: Traced,
    heads: Sequence[Any],
) -> list[Served]:
    """What every site serves, of heads as the model returns them."""
    leaves = [len(jax.tree.leaves(head)) for head in heads]
    examples = [count_examples(kind, [head]) for head in heads]
    return served(traced, leaves, examples)
