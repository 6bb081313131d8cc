"""From tapped sites to layers: which parameters belong together, and what is left uncovered."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex
from jax.interpreters import partial_eval

from kfac_optax._tree import named_leaves
from kfac_optax._types import (
    Layers,
    PyTree,
)
from kfac_optax.capture.discovery.program import with_taps
from kfac_optax.capture.front_ends import linen, nnx
from kfac_optax.capture.geometry import Lookup
from kfac_optax.capture.grouping.grouping import group, tapped_leaves
from kfac_optax.capture.jaxpr.calls import is_rule
from kfac_optax.capture.jaxpr.degrees import without_scale
from kfac_optax.capture.jaxpr.shared_leaves import Owner
from kfac_optax.capture.kernels.distribute import distributed
from kfac_optax.capture.row_axes import without_examples
from kfac_optax.capture.sites import Consumer, Site, analyse, count_taps
from kfac_optax.capture.tap import tapping

RANDOM_SIGNS = "rows shared by the examples: measured with random signs"


class Traced(NamedTuple):
    """A function traced with taps.

    Attributes:
      names: paths of the parameters, in order.
      jaxpr: closed jaxpr; inputs are the leaves of params, then those of the other arguments.
      out_shape: abstract result of the function.
      sites: taps that belong to a layer, or to none (`owner` -1), in order of execution.
      owner: index of the layer of each site.
      layers: the coverage.
    """

    names: tuple[str, ...]
    jaxpr: Any
    out_shape: PyTree
    sites: tuple[Site, ...]
    owner: tuple[int, ...]
    layers: Layers


def trace(
    function: Callable[..., PyTree],
    params: PyTree,
    args: Sequence[PyTree],
    where: str,
    check: Callable[[PyTree], int | None] = lambda out_shape: None,
    predicted: Callable[[PyTree], PyTree] | None = None,
) -> Traced:
    """Traces `function(params, *args)` with all front ends on and finds its layers; `check` sees
    its abstract result and says how many examples it has, `predicted` which part of it is the
    prediction (all, by default).

    Raises:
      ValueError: no layer was found, or a tapped one runs where it has no meaning.
    """
    # taps are placed while the user's function runs once, abstractly
    with tapping(), linen.intercepting(), nnx.intercepting():
        jaxpr, out_shape = jax.make_jaxpr(function, return_shape=True)(params, *args)
    examples = check(out_shape)
    # leaves in the order in which the jaxpr has them as inputs
    leaves = named_leaves(params)
    names = tuple(leaves)
    if len(names) != len(jax.tree.leaves(params)):
        raise ValueError(
            f"{where}: two parameters have the same path once normalised: {sorted(names)}."
        )
    bypassed = tapped_leaves(analyse(jaxpr.jaxpr, len(names)))
    # What the prediction does not depend on would be measured as zero, and a layer may be there for
    # a derivative only.
    jaxpr = _live(distributed(_live(jaxpr), len(names), bypassed))
    # a kernel that only a tap has read, which has made way for those of its parts, is read no more
    jaxpr = _live(with_taps(jaxpr, len(names), examples))
    analysis = analyse(jaxpr.jaxpr, len(names))
    bypassed -= tapped_leaves(analysis)
    # nothing that could become a layer, not even one outside of what the prediction needs
    consumers = itertools.chain(*analysis.consumers.values())
    has_rules = any(is_rule(x.name) for x in consumers)
    if not (analysis.sites or bypassed or has_rules):
        raise ValueError(
            f"{where}: no layer found in {getattr(function, '__name__', function)!r}, traced with "
            f"parameters {_named(names, analysis.consumers)}. Supported: "
            f"{', '.join(linen.SUPPORTED + nnx.SUPPORTED)}; in other code, parameters as stored in "
            "`x @ kernel + bias`, einsums, convolutions, `table[tokens]`, `x * scale`; anything "
            "else by hand: `s = kfac_optax.tap_dense(x @ kernel + bias, x, kernel, bias)`, "
            "`tap_conv`, `tap_embedding`, `tap_scale_shift`."
        )
    # sites of one parameter make a layer; what is left over gets a reason
    sites, owner, layers = group(analysis, names, leaves, bypassed)
    if not layers.layers:
        reasons = "; ".join(map(str, layers.uncovered))
        raise ValueError(
            f"{where}: no layer left that can be measured. Expected at least one layer "
            "whose output reaches the prediction and whose kernel is a parameter as stored "
            f"([inputs, outputs] or its transpose). {reasons}."
        )
    outputs = None if predicted is None else _outputs(out_shape, predicted)
    layers = _with_scale_free(layers, names, jaxpr, outputs)
    return Traced(names, jaxpr, out_shape, sites, owner, layers)


def _with_scale_free(
    layers: Layers,
    names: Sequence[str],
    closed: Any,
    outputs: Sequence[bool] | None,
) -> Layers:
    """The layers told which of them have no scale in these outputs (default all) of the closed
    jaxpr.
    """
    # new statistics of a batch have the scale of their layer, but are no prediction
    live = closed if outputs is None else _live(closed, outputs)
    position = {name: i for i, name in enumerate(names)}
    owners: list[list[Owner]] = [[] for _ in live.jaxpr.invars]
    for number, layer in enumerate(layers.layers):
        owners[position[layer.kernel]].append(Owner(number, layer.part))
        if layer.bias is not None:
            owners[position[layer.bias]].append(Owner(number, layer.bias_part))
    free = without_scale(live.jaxpr, owners)
    told = []
    for number, layer in enumerate(layers.layers):
        told.append(dataclasses.replace(layer, scale_free=number in free))
    return dataclasses.replace(layers, layers=tuple(told))


def _outputs(out_shape: PyTree, part: Callable[[PyTree], PyTree]) -> list[bool]:
    """Which arrays of the function's result are in that part of it."""
    leaves, treedef = jax.tree.flatten(out_shape)
    # positions of the part's arrays among the results
    numbers = range(len(leaves))
    own = part(treedef.unflatten(numbers))
    wanted = set(jax.tree.leaves(own))
    return [i in wanted for i in numbers]


def _named(names: Sequence[str], consumers: Mapping[int, Sequence[Consumer]]) -> str:
    """The first parameters, what uses them, and where."""
    words = []
    for i, name in enumerate(names[:5]):
        reading = consumers.get(i, ())[:3]
        uses = [f"{x.name} at {x.line}" if x.line else x.name for x in reading]
        # each once
        used_by = ", ".join(dict.fromkeys(uses)) or "nothing"
        words.append(f"{name or '(root)'} (used by {used_by})")
    if len(names) > 5:
        words.append("…")
    return ", ".join(words)


def _live(closed: Any, outputs: Sequence[bool] | None = None) -> Any:
    """The same closed jaxpr without equations on which none of these outputs (default all) depends."""
    if outputs is None:
        outputs = [True] * len(closed.jaxpr.outvars)
    # inputs stay, so that positions of the parameters do
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, list(outputs), instantiate=True)
    return jex.ClosedJaxpr(jaxpr, closed.consts)


def serve_all(traced: Traced, part: Callable[[PyTree], PyTree]) -> bool:
    """Whether that part of the function's result depends on every tap that was found."""
    pruned = _live(traced.jaxpr, _outputs(traced.out_shape, part))
    return count_taps(pruned.jaxpr) == len(traced.sites)


def with_examples(traced: Traced, examples: int, signs: bool) -> Traced:
    """The same model, its layers told whether their rows are those of `examples` examples.

    Axis 0 has to be as long as the batch, and the input has to depend on the arguments of the
    model: a table of as many positions as there are examples does not. Positions that are
    themselves passed as an argument, as many as there are examples, cannot be told apart from a
    batch; nor can constants in a model that closes over its batch.

    Args:
      traced: the model.
      examples: N.
      signs: the estimator tells the examples apart by random signs where they share rows, which the
        table then says.
    """
    # all uses of each layer; -1 stands for none
    uses: dict[int, list[Site]] = {}
    for site, owner in zip(traced.sites, traced.owner, strict=True):
        uses.setdefault(owner, []).append(site)
    layers = []
    for index, layer in enumerate(traced.layers.layers):
        mine = uses[index]
        own = _per_example(mine, examples)
        shared = any(without_examples(site, examples) for site in mine)
        notes = layer.notes
        if signs and shared and not own:
            notes = (*notes, RANDOM_SIGNS)
        layers.append(dataclasses.replace(layer, per_example=own, notes=notes))
    coverage = dataclasses.replace(traced.layers, layers=tuple(layers))
    return traced._replace(layers=coverage)


def _per_example(sites: Sequence[Site], examples: int) -> bool:
    # an unrolled recurrent layer starts from a state that is the same for every batch
    tables = [site for site in sites if isinstance(site.geometry, Lookup)]
    some = any(site.varies for site in sites)
    flows = some and all(site.varies for site in tables)
    # rows of a constant that was found may be anything: directions of a derivative, say
    flows = flows and all(site.varies for site in sites if site.found)
    leading = [site.row_shape[:1] for site in sites]
    return flows and all(rows == (examples,) for rows in leading)
