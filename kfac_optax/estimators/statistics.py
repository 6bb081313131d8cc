"""From a traced model and output cotangents to per-layer statistics: means over examples, samples
and devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._types import Block, Coupling, Layer, PyTree
from kfac_optax.capture.evaluate import (
    Measure,
    Probe,
    Zeros,
    as_cotangent,
    evaluate,
    from_cotangent,
    make_zeros,
)
from kfac_optax.capture.geometry import Lookup
from kfac_optax.capture.layers import Traced
from kfac_optax.capture.row_axes import stack_first, steps_in_a_row
from kfac_optax.capture.sites import Site
from kfac_optax.estimators.heads import Kind
from kfac_optax.estimators.measure import measure_rows, row_weights, site_measure
from kfac_optax.estimators.output_cotangents import OutputCotangents, mean_over
from kfac_optax.estimators.plan import Plan, Setting, set_up
from kfac_optax.estimators.served_heads import Served
from kfac_optax.linalg.weighted_rows import finite_padding


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
    traced: Traced, inputs: Sequence[Any], outputs: Callable[[PyTree], tuple[Any, Any]]
) -> Linearize:
    """Runs the model forward with probes; statistics are computed on the fly in the backward pass."""

    def linearize(asked: Asked):
        measures, inverses, extra, names = asked
        # cotangents of the probes are the statistics: zeros of their types stand in for them
        zeros = [
            None if m is None else make_zeros(s, m, extra, inverse)
            for s, m, inverse in zip(traced.sites, measures, inverses, strict=True)
        ]
        # inputs of the jaxpr whose own gradients are asked for
        positions = {name: traced.names.index(name) for name in names}

        def run(zeros, leaves):
            mine = list(inputs)
            for name, leaf in leaves.items():
                mine[positions[name]] = leaf
            probes = [
                None if z is None else Probe(z, inverse)
                for z, inverse in zip(zeros, inverses, strict=True)
            ]
            flat = evaluate(traced.jaxpr, mine, traced.sites, measures, extra, probes)
            return outputs(jax.tree.unflatten(jax.tree.structure(traced.out_shape), flat))

        # one forward pass, as many pullbacks as there are cotangents
        _, pull, heads = jax.vjp(
            run, zeros, {name: inputs[i] for name, i in positions.items()}, has_aux=True
        )
        return (lambda cotangents: Pulled(*pull(cotangents))), heads

    return linearize


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
        measure = jax.vmap(measure, in_axes=(0, 0, None, 0 if over_layers else None))
    measured = measure(*from_cotangent(site, rows), extra, inverse)
    # uses in the steps of a scan over time add up
    loops = tuple(i for i, (_, over_layers) in enumerate(site.scans) if not over_layers)
    return Zeros(jax.tree.map(lambda x: x.sum(loops), measured.summed), measured.rows)


def collect(
    plan: Plan,
    traced: Traced,
    linearize: Linearize,
    kind: Kind,
    output_cotangents: Callable[[Any], OutputCotangents],
    examples: int,
    weights: jax.Array | None,
    served: Sequence[Served],
) -> tuple[list[PyTree], PyTree]:
    """Statistics of every layer of the plan, `[copies, ...]` each, and that of the coupling (or
    `None`).

    A layer whose block absorbs has `(statistic, news)` there, columns among the news
    `[copies, pullbacks, ...]`.

    Args:
      plan: what to measure.
      traced: the model.
      linearize: its forward pass.
      kind: of estimator.
      output_cotangents: output cotangents, given the heads.
      examples: N.
      weights: example or term weights with mean one, or `None`.
      served: what every site serves.
    """
    setting = set_up(plan, traced, examples, weights, kind.name, served)
    # one measure for every site of a layer in the plan
    measures = [
        None
        if i is None
        else site_measure(
            site,
            setting.layer(plan, i),
            plan.blocks[i],
            plan.coupling if plan.layers[i].coupled else None,
            setting.use(plan, index),
            weights,
            kind.gradients,
            at_once=setting.uses(i) > 1,
            share=setting.share(index),
        )
        for index, (site, i) in enumerate(zip(traced.sites, setting.owner, strict=True))
    ]
    # [copies, ...] -> [*stack, groups, ...], as the site sees its layer
    inverses = [
        None if i is None else _of_site(site, plan.inverse(i))
        for site, i in zip(traced.sites, setting.owner, strict=True)
    ]
    # parameters without a layer are measured by their gradients
    single = [layer for layer in plan.layers if layer.kind == "diagonal"]
    if single and not kind.gradients:
        raise ValueError(
            f"{kind.name}: measures inputs of layers only, but {', '.join(x.path for x in single)} "
            "has none. Use uncovered='pass', or another estimator."
        )
    with jax.named_scope("kfac/measure"):
        names = [layer.kernel for layer in single]
        # linear in k: everything below is averaged over pullbacks, then over devices
        pull, heads = linearize(Asked(measures, inverses, weights, names))
        cotangents = output_cotangents(heads)

        def one(k: Any) -> tuple[tuple[list[PyTree], PyTree], dict[int, PyTree]]:
            pulled = pull(cotangents.make(k))
            blocks, across = _per_layer(plan, setting, pulled.sites)
            columns = {}
            # rows of the batch are joined, not averaged
            for i, block in enumerate(plan.blocks):
                if block.absorb is not None and block.absorbs == "columns":
                    blocks[i], columns[i] = blocks[i]
            if not single:
                return (blocks, across), columns
            # One gradient of all examples squared estimates the sum of squares, since the terms are
            # independent with mean
            # zero: by labels drawn from the model, or by random signs.
            for i, layer in enumerate(plan.layers):
                if layer.kind == "diagonal":
                    blocks[i] = (
                        jnp.square(pulled.leaves[layer.kernel].astype(plan.dtype)).reshape(1, 1, -1)
                        / examples
                    )
            return (blocks, across), columns

        (blocks, across), columns = mean_over(one, cotangents.count)
        if plan.axis_name is not None:
            blocks, across = jax.lax.pmean((blocks, across), plan.axis_name)
            columns = jax.tree.map(lambda x: rows_of_all_devices(x, plan.axis_name), columns)
        # [pullbacks, copies, ...] -> [copies, pullbacks, ...]
        for i, mine in columns.items():
            blocks[i] = blocks[i], jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), mine)
        return blocks, across


def _of_site(site: Site, inverse: PyTree) -> PyTree:
    """What is held for a layer, `[copies, ...]`, as its probe reads it, `[*stack, groups, ...]`."""
    return jax.tree.map(lambda x: x.reshape(*site.stack, -1, *x.shape[1:]), inverse)


def rows_of_all_devices(x: jax.Array, axis_name: Any) -> jax.Array:
    """Rows `[..., n, d]` of every device one after another, divided by the root of their number:
    columns of a mean.
    """
    devices, mine = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    # a sum, unlike all_gather, gives what shard_map knows to be the same on all devices
    # [devices, ..., n, d], the own rows in their place and zeros elsewhere
    apart = jnp.zeros((devices, *x.shape), x.dtype).at[mine].set(x)
    together = jnp.moveaxis(jax.lax.psum(apart, axis_name), 0, -3)
    return together.reshape(*x.shape[:-2], -1, x.shape[-1]) / math.sqrt(devices)


class _Measured(NamedTuple):
    """What the pullback of one site gave, with `[copies, ...]` in front; `None` for what was not
    measured that way.
    """

    block: PyTree  # statistic
    rows: PyTree  # (a, g), [copies, N, T, ...]
    across: PyTree  # statistic of the coupling
    seen: PyTree  # what the coupling sees, [copies, N, *positions, *steps, ...]


def _per_layer(
    plan: Plan, setting: Setting, pulled: Sequence[Zeros | None]
) -> tuple[list[PyTree], PyTree]:
    """Statistics of the layers that have sites, in the order of the plan (`None` for others), and
    of the coupling.
    """
    # sites of one layer: its uses
    uses: list[list[_Measured]] = [[] for _ in plan.layers]
    for site, owner, zeros in zip(setting.sites, setting.owner, pulled, strict=True):
        if owner is not None and zeros is not None:
            uses[owner].append(_arranged(plan.coupling, site, zeros))
    blocks, across = [], []
    for i, (layer, mine) in enumerate(zip(plan.layers, uses, strict=True)):
        if not mine:
            blocks.append(None)
            continue
        # statistics add up over uses; rows that were kept are measured of all uses at once
        late = _late(plan, setting, i, [m.rows for m in mine if m.rows is not None])
        blocks.append(_sum([m.block for m in mine if m.block is not None] + late))
        if plan.coupling is not None and layer.coupled:
            across.append(_across(plan.coupling, setting, layer, mine))
    return blocks, None if plan.coupling is None else plan.coupling.reduce(across, setting.examples)


def _arranged(coupling: Coupling | None, site: Site, zeros: Zeros) -> _Measured:
    axes = len(site.stack) + 1  # the groups of a layer follow its stack
    (block, across), (rows, seen) = zeros.summed, zeros.rows
    features = _features(coupling)

    def flat(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), tree)

    if rows is not None:
        # [*stack, groups, N, ...] -> [copies, N, T, ...]
        a, g = from_cotangent(site, rows)
        tokens = isinstance(site.geometry, Lookup)
        rows = (
            steps_in_a_row(a, site, 0 if tokens else 1),
            None if g is None else steps_in_a_row(g, site, 1),
        )
    return _Measured(
        flat(block),
        rows,
        flat(across),
        jax.tree.map(lambda x: stack_first(x, site, features), seen),
    )


def _late(
    plan: Plan,
    setting: Setting,
    i: int,
    kept: list,
) -> list[PyTree]:
    """Statistic of layer `i` from the rows of all its uses, one after another on the axis of
    steps.
    """
    if not kept:
        return []
    layer, block = plan.layers[i], plan.blocks[i]
    # weights [N, T] of all uses in the order of their rows
    weights = _weights_in_a_row(setting, layer, [a.shape[1:3] for a, _ in kept])
    uses = [setting.use(plan, index) for index, owner in enumerate(setting.owner) if owner == i]
    _check_batches(layer, block, [use.examples for use in uses])
    a, g = jax.tree.map(lambda *xs: jnp.concatenate(xs, 2), *kept)
    if weights is not None and g is not None:
        g = finite_padding(g, weights[..., None])
    # a block sees one head, or that there are several
    heads = {use.head for use in uses}
    use = uses[0]._replace(weights=weights, head=heads.pop() if len(heads) == 1 else None)
    return [
        jax.vmap(lambda a, g, inverse: measure_rows(block, a, g, use, inverse))(
            a, g, plan.inverse(i)
        )
    ]


def _check_batches(layer: Layer, block: Block, examples: Sequence[int]) -> None:
    if len(set(examples)) > 1:
        raise ValueError(
            f"layer {layer.path!r}: block {block.name!r} sees all uses of a layer at once, but "
            f"these serve heads of {sorted(set(examples))} examples. Expected heads of the same "
            "number of examples, or a block that adds its uses up, such as kronecker()."
        )


def _across(
    coupling: Coupling,
    setting: Setting,
    layer: Layer,
    uses: list[_Measured],
) -> PyTree:
    """The coupling's statistic of one layer; maps of several uses are laid out on one axis, one
    after another.
    """
    parts = [m.across for m in uses if m.across is not None]
    seen, features = [m.seen for m in uses if m.seen is not None], _features(coupling)
    if seen:
        # (N, *positions) of each use
        shapes = [a.shape[1 : a.ndim - features] for a, _ in seen if a is not None]
        weights = _weights_in_a_row(setting, layer, shapes) if shapes else None
        if len(seen) > 1:

            def flat(x: jax.Array) -> jax.Array:
                return x.reshape(*x.shape[:2], -1, *x.shape[x.ndim - features :])

            seen = [jax.tree.map(lambda *xs: jnp.concatenate([flat(x) for x in xs], 2), *seen)]
        parts.append(coupling.measure(*seen[0], weights))
    return _sum(parts)


def _features(coupling: Coupling | None) -> int:
    """Trailing axes of what the coupling sees of a row."""
    return 1 if coupling is not None and coupling.sees == "rows" else 0


def _weights_in_a_row(
    setting: Setting, layer: Layer, rows: Sequence[tuple[int, ...]]
) -> jax.Array | None:
    """Weights of the rows `(N, *positions)` of each use, several uses one after another on one
    axis.
    """
    if setting.weights is None:
        return None
    # [N, *positions] of every use, then [N, T]
    spread = [row_weights(setting.weights, shape, layer.path) for shape in rows]
    if len(spread) == 1:
        return spread[0]
    return jnp.concatenate([w.reshape(len(w), -1) for w in spread if w is not None], 1)


def _sum(trees: list[PyTree]) -> PyTree:
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *trees)
