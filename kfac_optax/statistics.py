"""From a traced model and output cotangents to per-layer statistics: means over examples, samples and devices."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._types import Block, Coupling, Layer, Layers, PyTree, Use
from kfac_optax.capture.evaluate import Measure, Zeros, evaluate, make_zeros
from kfac_optax.capture.layers import Traced
from kfac_optax.capture.sites import Site
from kfac_optax.seeds import Seeds, mean_over


class Plan(NamedTuple):
    """What to measure.

    Attributes:
      layers: the layers, by their owner's tree (a subset of the model's).
      block: measures each layer.
      coupling: measures across layers, or `None`.
      dtype: dtype of the statistics.
      axis_name: mapped axis over which the batch is split, or `None`.
    """

    layers: tuple[Layer, ...]
    block: Block
    coupling: Coupling | None
    dtype: Any
    axis_name: Any = None


# Gives `(pull, heads)` for one measure per site: `pull(cotangents)` returns one `Zeros` of statistics per site.
Linearize = Callable[[Sequence[Measure | None], PyTree], tuple[Callable[[Any], list[Zeros | None]], Any]]


def linearize_now(traced: Traced, inputs: Sequence[Any], outputs: Callable[[PyTree], tuple[Any, Any]]) -> Linearize:
    """Runs the model forward with probes; statistics are computed on the fly in the backward pass."""

    def linearize(measures: Sequence[Measure | None], extra: PyTree):
        zeros = [None if m is None else make_zeros(s, m, extra) for s, m in zip(traced.sites, measures, strict=True)]

        def run(zeros):
            flat = evaluate(traced.jaxpr, inputs, traced.sites, measures, extra, zeros)
            return outputs(jax.tree.unflatten(jax.tree.structure(traced.out_shape), flat))

        _, pull, heads = jax.vjp(run, zeros, has_aux=True)
        return (lambda cotangents: pull(cotangents)[0]), heads

    return linearize


def rows_measure(a: jax.Array, g: jax.Array, extra: PyTree) -> Zeros:
    """Keeps the rows themselves, for a forward pass that is shared before it is known what to measure."""
    return Zeros(None, (a, g))


def apply_to_rows(site: Site, measure: Measure, rows: tuple[jax.Array, jax.Array], extra: PyTree) -> Zeros:
    """The statistics of a site from its stored rows, as its probe would have measured them."""
    for _ in range(len(site.scans) + site.stacked):
        measure = jax.vmap(measure, in_axes=(0, 0, None))
    measured = measure(*rows, extra)
    loops = tuple(i for i, (_, over_layers) in enumerate(site.scans) if not over_layers)
    return Zeros(jax.tree.map(lambda x: x.sum(loops), measured.summed), measured.rows)


def collect(
    plan: Plan, traced: Traced, linearize: Linearize, seeds: Callable[[Any], Seeds], examples: int,
    weights: jax.Array | None, gradients: bool, where: str,
) -> tuple[list[PyTree], PyTree]:  # fmt: skip
    """Statistics of every layer of the plan, `[copies, ...]` each, and that of the coupling (or `None`).

    Args:
      plan: what to measure.
      traced: the model.
      linearize: its forward pass.
      seeds: output cotangents, given the heads.
      examples: N.
      weights: example or term weights with mean one, or `None`.
      gradients: whether output gradients are meaningful (`False`: inputs only).
      where: name of the estimator, for errors.
    """
    matched = match_layers(plan.layers, traced.layers, where)
    wanted = {position: i for i, position in enumerate(matched)}
    measures = [
        _site_measure(plan, plan.layers[wanted[owner]], traced.layers.layers[owner].rows, site, examples, gradients)
        if owner in wanted
        else None
        for site, owner in zip(traced.sites, traced.owner, strict=True)
    ]
    with jax.named_scope("kfac/measure"):
        pull, heads = linearize(measures, weights)
        plans = seeds(heads)

        def one(k: Any) -> tuple[list[PyTree], PyTree]:
            return _per_layer(plan, traced, wanted, pull(plans.make(k)), examples)

        result = mean_over(one, plans.count)
        return jax.lax.pmean(result, plan.axis_name) if plan.axis_name is not None else result


def match_layers(wanted: Sequence[Layer], found: Layers, where: str) -> list[int]:
    """Positions of the wanted layers among those of the traced model.

    Raises:
      ValueError: a layer is missing or has another shape, so the curvature belongs to another model.
    """
    positions = {layer.kernel: i for i, layer in enumerate(found.layers)}
    result = []
    for layer in wanted:
        if layer.kernel not in positions:
            raise ValueError(
                f"{where}: `curvature` has no layer {layer.path!r}; it has {', '.join(x.path for x in found.layers)}. It "
                "was made for another model or parameter tree than `layers`: use the same estimator for both."
            )
        other = found.layers[positions[layer.kernel]]
        mine, theirs = ((*x.stack, x.inputs, x.outputs) for x in (layer, other))
        if mine != theirs or (layer.bias is not None and layer.bias != other.bias):
            raise ValueError(
                f"{where}: layer {layer.path!r} has shape {mine}{' with bias' if layer.bias else ''} in `layers` but {theirs}"
                f"{' with bias' if other.bias else ''} in `curvature`. Make `layers` again for this model: "
                "layers = fisher.layers(params, *args)."
            )
        result.append(positions[layer.kernel])
    return result


def _site_measure(plan: Plan, layer: Layer, rows: int, site: Site, examples: int, gradients: bool) -> Measure:
    lead = site.a.shape[site.stacked : -1]
    coupling = plan.coupling
    if coupling is not None and (not lead or lead[0] != examples):
        raise ValueError(
            f"layer {layer.path!r}: its input has leading axes {lead}, but the batch has {examples} examples. The coarse "
            "correction needs per-example sums, so axis 0 of every layer's input has to be the examples: reshape to "
            "[examples, positions, features] instead of [examples * positions, features], or use `kfac` without it."
        )

    def measure(a: jax.Array, g: jax.Array, weights: jax.Array | None) -> Zeros:
        use = Use(
            layer.bias is not None, layer.outputs, examples, rows, plan.dtype, row_weights(weights, lead, layer.path)
        )
        g_or_none = g if gradients else None
        block = plan.block.measure(a, g_or_none, use)
        across = None if coupling is None else coupling.measure(a, g_or_none, use)
        if coupling is not None and coupling.rows:
            return Zeros((block, None), across)
        return Zeros((block, across), None)

    return measure


def row_weights(weights: jax.Array | None, rows: tuple[int, ...], path: str) -> jax.Array | None:
    """Weights `[*batch]` of the likelihood's terms spread over a layer's rows.

    Raises:
      ValueError: the weights do not say how much each row counts.
    """
    if weights is None:
        return None
    if weights.ndim > len(rows) or weights.shape != rows[: weights.ndim]:
        raise ValueError(
            f"layer {path!r}: weights of shape {weights.shape} do not fit its rows {rows}; expected the leading axes of "
            "the layer's input. Use one weight per example, or mask the layer's input in the model."
        )
    return jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(rows) - weights.ndim)), rows)


def _per_layer(plan, traced, wanted, pulled, examples) -> tuple[list[PyTree], PyTree]:
    blocks: list[Any] = [None] * len(plan.layers)
    across: list[Any] = [None] * len(plan.layers)
    for site, owner, zeros in zip(traced.sites, traced.owner, pulled, strict=True):
        if owner not in wanted:
            continue
        i, stack = wanted[owner], site.stack
        block, summed = zeros.summed
        blocks[i] = _add(blocks[i], _flat(block, len(stack)))
        if plan.coupling is None:
            continue
        if plan.coupling.rows:
            rows = jax.tree.map(lambda x, s=site: _stack_first(x, s), zeros.rows)
            across[i] = (
                rows if across[i] is None else jax.tree.map(lambda x, y: jnp.concatenate([x, y], -1), across[i], rows)
            )
        else:
            across[i] = _add(across[i], _flat(summed, len(stack)))
    if plan.coupling is None:
        return blocks, None
    return blocks, plan.coupling.reduce(across, examples)


def _add(total: PyTree, part: PyTree) -> PyTree:
    return part if total is None else jax.tree.map(jnp.add, total, part)


def _flat(tree: PyTree, axes: int) -> PyTree:
    """`[*stack, ...] -> [copies, ...]` for every leaf."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), tree)


def _stack_first(x: jax.Array, site: Site) -> jax.Array:
    """Rows `[*scans, *stacked, N, R] -> [copies, N, T]`: steps in time become positions."""
    loops = [i for i, (_, over_layers) in enumerate(site.scans) if not over_layers]
    x = jnp.moveaxis(x, loops, range(x.ndim - 1 - len(loops), x.ndim - 1))
    lead = len(site.stack)
    return x.reshape(-1, x.shape[lead], math.prod(x.shape[lead + 1 :]))
