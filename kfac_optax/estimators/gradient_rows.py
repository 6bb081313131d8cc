"""The rows whose products are the gradients of layers, for blocks that precondition these instead."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kfac_optax._types import Layer
from kfac_optax.capture.evaluate import Zeros, from_cotangent
from kfac_optax.capture.geometry import Conv
from kfac_optax.capture.layers import Traced
from kfac_optax.capture.row_axes import rows_of_site, steps_in_a_row
from kfac_optax.estimators.plan import Plan, set_up
from kfac_optax.linalg.gram import homogeneous


def rows_of_layers(
    plan: Plan, traced: Traced, sites: Sequence[Zeros | None], where: str
) -> dict[Layer, tuple[jax.Array, jax.Array]]:
    """Rows `a [copies, R, p]`, with the bias coordinate, and `g [copies, R, q]` of all uses of
    layers that can use them.

    Those of dense layers: `R` counts examples, positions and uses.
    """
    setting = set_up(plan, traced, 0, None, where)
    uses: dict[Layer, list] = {}
    for site, i, kept in zip(traced.sites, setting.owner, sites, strict=True):
        # with notes, something besides the rows has a part in the gradient
        if i is None or kept is None or plan.layers[i].notes:
            continue
        if plan.blocks[i].solve_rows is None:
            continue
        # the rows are patches, which would take more than the gradient they save
        if isinstance(site.geometry, Conv):
            continue
        # [copies, N, positions and steps, p]; then all rows of a copy on one axis
        layer = setting.layer(plan, i)
        a, g = rows_of_site(site, layer, *from_cotangent(site, kept.rows))
        a = _flat(steps_in_a_row(a, site, 1))
        g = _flat(steps_in_a_row(g, site, 1))
        # a^T g is the gradient of kernel and bias together, [p, q]
        if layer.bias is not None and not layer.given_rows:
            a = homogeneous(a)
        uses.setdefault(plan.layers[i], []).append((a, g))
    # several uses of one layer, rows behind one another: their products add up
    return {layer: _behind_one_another(mine) for layer, mine in uses.items()}


def _flat(x: jax.Array) -> jax.Array:
    """`[copies, N, T, d] -> [copies, N T, d]`."""
    return x.reshape(len(x), -1, x.shape[-1])


def _behind_one_another(uses: Sequence[tuple]) -> tuple[jax.Array, jax.Array]:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, 1), *uses)
