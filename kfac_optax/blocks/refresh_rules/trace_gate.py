"""A layer's own say about its refresh, from the traces of its factors: THOR's rule."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kfac_optax._types import Block, Numeric, PyTree
from kfac_optax._validate import check_number
from kfac_optax.blocks.refresh_rules.own_rules import check_without_rules, uses_of_inverse


class Gated(NamedTuple):
    """What the block holds, and what the gate remembers of the layer."""

    inverse: PyTree
    trace: Float[Array, ""]  # of the damped block at the last refresh, zero before the first
    statistics: Int[Array, ""]  # how many there were at the last look
    refreshes: Int[Array, ""]
    frozen: Int[Array, ""]  # one where the layer is never refreshed again


def trace_gate(
    block: Block,
    shape: tuple[int, int],
    *,
    refresh_above: Numeric = 0.01,
    freeze_below: Numeric = 0.001,
) -> Block:
    """A block whose inverse is made anew only where the trace of the damped curvature has changed.

    At every refresh of the schedule, with `t = tr(A + sqrt(damping) I) tr(G + sqrt(damping) I)` now
    and `t_0` that of the inverse in use, `r = |t - t_0| / t_0`:

    - `r >= refresh_above`: the layer is refreshed;
    - `freeze_below <= r < refresh_above`: it keeps its inverse this time;
    - `r < freeze_below`: it keeps its inverse for good.

    The first refresh is always made. Without a new statistic since the last look the layer is not
    frozen. With both bounds zero the block is refreshed as often as without the gate.

    Args:
      block: whose statistic is a pair of factors, square matrices or blocks of some; it has no
        `refresh` or `due` of its own.
      shape: `[p, q]` of the layers that get it.
      refresh_above: relative change of the trace that is worth a refresh.
      freeze_below: one that ends refreshes of the layer, not above the former.

    Returns:
      A `Block` with `Gated` as inverse.

    Raises:
      ValueError: a bound below zero, `freeze_below > refresh_above`, or a block with a rule of its
        own.

    >>> import kfac_optax as ko
    >>> gated = trace_gate(ko.kronecker(), (2, 1))
    >>> factors = gated.init(ko.testing.dense_layer(2, 1), jnp.float32)
    >>> held = gated.factorize(factors, jnp.float32(1.0))
    >>> due, _ = gated.due(held, factors, jnp.float32(1.0), jnp.int32(1))
    >>> print(due)
    True

    Reference: Chen et al., THOR, Trace-based Hardware-driven Layer-Oriented Natural Gradient
      Descent Computation (2021).
    """
    _check(block, refresh_above, freeze_below)

    def trace(statistic: PyTree, damping: Array) -> Array:
        # tr(A + sqrt(damping) I) tr(G + sqrt(damping) I)
        total = jnp.ones((), damping.dtype)
        for blocks, dimension in zip(statistic, shape, strict=True):
            total *= jnp.einsum("...ii->", blocks) + dimension * jnp.sqrt(damping)
        return total

    def factorize(statistic: PyTree, damping: Array) -> Gated:
        made = block.factorize(statistic, damping)
        nothing, none = jnp.zeros((), damping.dtype), jnp.zeros((), jnp.int32)
        return Gated(made, nothing, none, none, none)

    def refresh(
        gated: Gated,
        statistic: PyTree,
        damping: Array,
        count: Array,
    ) -> Gated:
        # an inverse of no statistic is none to compare with
        now = jnp.where(count > 0, trace(statistic, damping), 0)
        made = block.factorize(statistic, damping)
        return Gated(made, now, count, gated.refreshes + 1, gated.frozen)

    def due(
        gated: Gated,
        statistic: PyTree,
        damping: Array,
        count: Array,
    ) -> tuple[Array, Gated]:
        # |t - t_0|, against shares of t_0
        change = jnp.abs(trace(statistic, damping) - gated.trace)
        first = gated.trace == 0
        # without a quotient: no change is no change of a trace of zero as well
        worth = first | (change >= refresh_above * gated.trace)
        still = change < freeze_below * gated.trace
        settled = ~first & still & (count > gated.statistics)
        # once frozen, always frozen
        frozen = jnp.maximum(gated.frozen, settled.astype(jnp.int32))
        kept = gated._replace(statistics=count, frozen=frozen)
        return worth & (gated.frozen == 0), kept

    return block._replace(
        name=f"{block.name}, trace gate",
        factorize=factorize,
        refresh=refresh,
        due=due,
        solve_rows=None,
        **uses_of_inverse(block, lambda gated: gated.inverse),
    )


def _check(block: Block, refresh_above: Numeric, freeze_below: Numeric) -> None:
    where = "trace_gate"
    check_number(where, "refresh_above", refresh_above, at_least=0)
    check_number(where, "freeze_below", freeze_below, at_least=0)
    check_without_rules(where, block)
    # traced or injected bounds cannot be compared at construction
    numbers = not any(isinstance(x, jax.Array) for x in (refresh_above, freeze_below))
    if numbers and freeze_below > refresh_above:
        raise ValueError(
            f"{where}: freeze_below={freeze_below!r} and refresh_above={refresh_above!r}; expected "
            "freeze_below <= refresh_above: a layer cannot be refreshed and frozen at once."
        )
