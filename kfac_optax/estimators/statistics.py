"""From a traced model and output cotangents to per-layer statistics: means over examples, samples
and devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._layout import as_replicated
from kfac_optax._types import PyTree
from kfac_optax.capture.evaluate import Measure
from kfac_optax.capture.layers import Traced
from kfac_optax.capture.sites import Site
from kfac_optax.estimators.heads import Kind
from kfac_optax.estimators.linearization import Asked, Linearize, Pulled
from kfac_optax.estimators.measure import site_measure
from kfac_optax.estimators.near_means import means_of_plan
from kfac_optax.estimators.output_cotangents import OutputCotangents, mean_over
from kfac_optax.estimators.plan import Plan, Setting, set_up
from kfac_optax.estimators.served_heads import Served
from kfac_optax.estimators.uses_of_layers import per_layer


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
    measures = _measures(plan, setting, kind.gradients)
    # [copies, ...] -> [*stack, groups, ...], as the site sees its layer
    inverses = [
        None if i is None else _of_site(site, plan.inverse(i))
        for site, i in zip(traced.sites, setting.owner, strict=True)
    ]
    names = _single(plan, kind)
    with jax.named_scope("kfac/measure"):
        # linear in k: everything below is averaged over pullbacks, then over devices
        pull, heads = linearize(Asked(measures, inverses, weights, names))
        cotangents = output_cotangents(heads)

        def one(k: Any) -> tuple[tuple[list[PyTree], PyTree], dict[int, PyTree]]:
            return _of_pullback(plan, setting, pull(cotangents.make(k)))

        (blocks, across), columns = mean_over(one, cotangents.count)
        if plan.axis_name is not None:
            blocks, across = means_of_plan(plan, blocks, across)
            columns = jax.tree.map(lambda x: rows_of_all_devices(x, plan.axis_name), columns)
        # [pullbacks, copies, ...] -> [copies, pullbacks, ...]
        for i, mine in columns.items():
            news = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), mine)
            blocks[i] = blocks[i], news
        return blocks, across


def _measures(
    plan: Plan,
    setting: Setting,
    gradients: bool,
) -> list[Measure | None]:
    """One measure for every site of a layer in the plan."""
    measures: list[Measure | None] = []
    for index, (site, i) in enumerate(zip(setting.sites, setting.owner, strict=True)):
        if i is None:
            measures.append(None)
            continue
        measure = site_measure(
            site,
            setting.layer(plan, i),
            plan.blocks[i],
            plan.coupling if plan.layers[i].coupled else None,
            setting.use(plan, index),
            setting.weights,
            gradients,
            at_once=setting.uses(i) > 1,
            share=setting.share(index),
            owners=plan.owners[i] if plan.owners else None,
        )
        measures.append(measure)
    return measures


def _single(plan: Plan, kind: Kind) -> list[str]:
    """Paths of parameters without a layer, which are measured by their gradients.

    Raises:
      ValueError: the estimator measures none.
    """
    # one leaf may have several, boxes that no other layer has
    names = list(dict.fromkeys(x.kernel for x in plan.layers if x.kind == "diagonal"))
    if names and not kind.gradients:
        paths = [layer.path for layer in plan.layers if layer.kind == "diagonal"]
        raise ValueError(
            f"{kind.name}: measures inputs of layers only, but {', '.join(paths)} has none. Use "
            "uncovered='pass', or another estimator."
        )
    return names


def _of_pullback(
    plan: Plan,
    setting: Setting,
    pulled: Pulled,
) -> tuple[tuple[list[PyTree], PyTree], dict[int, PyTree]]:
    """Statistics of all layers and of the coupling, and apart from them the rows of the batch."""
    blocks, across = per_layer(plan, setting, pulled.sites)
    columns = {}
    for i, (layer, block) in enumerate(zip(plan.layers, plan.blocks, strict=True)):
        # rows of the batch are joined, not averaged
        if block.absorb is not None and block.absorbs == "columns":
            blocks[i], columns[i] = blocks[i]
        # One gradient of all examples squared estimates the sum of squares, since the terms are
        # independent with mean zero: by labels drawn from the model, or by random signs.
        if layer.kind == "diagonal":
            gradient = as_replicated(pulled.leaves[layer.kernel])
            gradient = gradient[layer.box(layer.part)].astype(plan.dtype)
            blocks[i] = jnp.square(gradient).reshape(1, 1, -1) / setting.examples
    return (blocks, across), columns


def _of_site(site: Site, inverse: PyTree) -> PyTree:
    """What is held for a layer, `[copies, ...]`, as its probe reads it, `[*stack, groups, ...]`."""
    return jax.tree.map(lambda x: x.reshape(*site.stack, -1, *x.shape[1:]), inverse)


def rows_of_all_devices(x: jax.Array, axis_name: Any) -> jax.Array:
    """Rows `[..., n, d]` of every device one after another, divided by the root of their number:
    columns of a mean.
    """
    devices, mine = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    # [devices, ..., n, d], the own rows in their place and zeros elsewhere; a sum, unlike
    # all_gather, gives what shard_map knows to be the same on all devices
    zeros = jnp.zeros((devices, *x.shape), x.dtype)
    apart = zeros.at[mine].set(x)
    together = jnp.moveaxis(jax.lax.psum(apart, axis_name), 0, -3)
    joined = together.reshape(*x.shape[:-2], -1, x.shape[-1])
    return joined / math.sqrt(devices)
