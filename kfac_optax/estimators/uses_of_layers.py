"""Statistics of layers from what the pullbacks of their sites gave: uses added up, or measured at
once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._types import Block, Coupling, Layer, PyTree, Use
from kfac_optax.capture.evaluate import Zeros, from_cotangent
from kfac_optax.capture.geometry import Lookup
from kfac_optax.capture.row_axes import stack_first, steps_in_a_row
from kfac_optax.capture.sites import Site
from kfac_optax.estimators.block_measure import over_groups
from kfac_optax.estimators.measure import row_weights
from kfac_optax.estimators.plan import Plan, Setting
from kfac_optax.linalg.weighted_rows import finite_padding


class _Measured(NamedTuple):
    """What the pullback of one site gave, with `[copies, ...]` in front; `None` for what was not
    measured that way.
    """

    block: PyTree  # statistic
    rows: PyTree  # (a, g), [copies, N, T, ...]
    across: PyTree  # statistic of the coupling
    seen: PyTree  # what the coupling sees, [copies, N, *positions, *steps, ...]


def per_layer(
    plan: Plan,
    setting: Setting,
    pulled: Sequence[Zeros | None],
) -> tuple[list[PyTree], PyTree]:
    """Statistics of the layers that have sites, in the order of the plan (`None` for others), and
    of the coupling.
    """
    coupling = plan.coupling
    # sites of one layer: its uses
    uses: list[list[_Measured]] = [[] for _ in plan.layers]
    for site, owner, zeros in zip(setting.sites, setting.owner, pulled, strict=True):
        if owner is not None and zeros is not None:
            uses[owner].append(_arranged(coupling, site, zeros))
    blocks: list[PyTree] = []
    across: list[PyTree] = []
    for i, (layer, mine) in enumerate(zip(plan.layers, uses, strict=True)):
        blocks.append(_of_block(plan, setting, i, mine) if mine else None)
        if mine and coupling is not None and layer.coupled:
            across.append(_across(coupling, setting, layer, mine))
    if coupling is None:
        return blocks, None
    return blocks, coupling.reduce(across, setting.examples)


def _arranged(coupling: Coupling | None, site: Site, zeros: Zeros) -> _Measured:
    (block, across), (rows, seen) = zeros.summed, zeros.rows
    axes = len(site.stack) + 1  # the groups of a layer follow its stack
    features = _features(coupling)

    def flat(x: jax.Array) -> jax.Array:
        # [*stack, groups, ...] -> [copies, ...]
        return x.reshape(-1, *x.shape[axes:])

    return _Measured(
        jax.tree.map(flat, block),
        None if rows is None else _in_a_row(site, rows),
        jax.tree.map(flat, across),
        jax.tree.map(lambda x: stack_first(x, site, features), seen),
    )


def _in_a_row(site: Site, rows: PyTree) -> tuple[jax.Array, jax.Array | None]:
    """Kept rows `[*stack, groups, N, ...]` as `[copies, N, T, ...]`."""
    a, g = from_cotangent(site, rows)
    # rows of integers have no axis of features
    tokens = isinstance(site.geometry, Lookup)
    a = steps_in_a_row(a, site, 0 if tokens else 1)
    if g is not None:
        g = steps_in_a_row(g, site, 1)
    return a, g


def _of_block(
    plan: Plan,
    setting: Setting,
    i: int,
    uses: Sequence[_Measured],
) -> PyTree:
    """Statistics add up over uses; rows that were kept are measured of all uses at once."""
    statistics = [m.block for m in uses if m.block is not None]
    kept = [m.rows for m in uses if m.rows is not None]
    if kept:
        statistics.append(_of_kept_rows(plan, setting, i, kept))
    return _sum(statistics)


def _of_kept_rows(
    plan: Plan,
    setting: Setting,
    i: int,
    kept: list,
) -> PyTree:
    """Statistic of layer `i` from the rows of all its uses, one after another on the axis of
    steps.
    """
    layer, block = plan.layers[i], plan.blocks[i]
    # weights [N, T] of all uses in the order of their rows
    shapes = [a.shape[1:3] for a, _ in kept]
    weights = _weights_in_a_row(setting, layer, shapes)
    owned = [index for index, owner in enumerate(setting.owner) if owner == i]
    uses = [setting.use(plan, index) for index in owned]
    _check_batches(layer, block, [use.examples for use in uses])
    a, g = jax.tree.map(lambda *xs: jnp.concatenate(xs, 2), *kept)
    if weights is not None and g is not None:
        g = finite_padding(g, weights[..., None])
    use = _of_all(uses)._replace(weights=weights)
    return over_groups(block, a, g, use, plan.inverse(i))


def _of_all(uses: Sequence[Use]) -> Use:
    # a block sees one head, or that there are several
    heads = {use.head for use in uses}
    head = heads.pop() if len(heads) == 1 else None
    return uses[0]._replace(head=head)


def _check_batches(
    layer: Layer,
    block: Block,
    examples: Sequence[int],
) -> None:
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
    uses: Sequence[_Measured],
) -> PyTree:
    """The coupling's statistic of one layer; maps of several uses are laid out on one axis, one
    after another.
    """
    parts = [m.across for m in uses if m.across is not None]
    seen = [m.seen for m in uses if m.seen is not None]
    if seen:
        features = _features(coupling)
        # (N, *positions) of each use
        shapes = [a.shape[1 : a.ndim - features] for a, _ in seen if a is not None]
        weights = _weights_in_a_row(setting, layer, shapes) if shapes else None
        together = seen[0] if len(seen) == 1 else _side_by_side(seen, features)
        parts.append(coupling.measure(*together, weights))
    return _sum(parts)


def _side_by_side(seen: Sequence[PyTree], features: int) -> PyTree:
    """What the coupling sees of several uses, `[copies, N, positions of all, *features]`."""

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, *x.shape[x.ndim - features :])

    def joined(*xs: jax.Array) -> jax.Array:
        return jnp.concatenate([flat(x) for x in xs], 2)

    return jax.tree.map(joined, *seen)


def _features(coupling: Coupling | None) -> int:
    """Trailing axes of what the coupling sees of a row."""
    return 1 if coupling is not None and coupling.sees == "rows" else 0


def _weights_in_a_row(
    setting: Setting,
    layer: Layer,
    rows: Sequence[tuple[int, ...]],
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
    flat = [w.reshape(len(w), -1) for w in spread if w is not None]
    return jnp.concatenate(flat, 1)


def _sum(trees: list[PyTree]) -> PyTree:
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *trees)
