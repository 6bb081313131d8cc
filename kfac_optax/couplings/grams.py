"""Gram matrices of channel sums over all pairs of layers, whatever the shapes of their maps."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kfac_optax.couplings.resampling import Resample
from kfac_optax.linalg.gram import replicated


class Grams(NamedTuple):
    """Entry sums of all cross factors: `inputs[i, j] = sum(A_ij)`, `outputs[i, j] = sum(G_ij)`,
    both `[L, L]`.
    """

    inputs: Float[Array, "L L"]
    outputs: Float[Array, "L L"]


class Sums(NamedTuple):
    """Channel sums of one layer, weights of the examples inside as roots."""

    inputs: Float[Array, "copies N *positions"]
    outputs: Float[Array, "copies N *positions"]


def grams_of(
    measured: Sequence[Sums],
    examples: int,
    select: Resample,
    precision: jax.lax.PrecisionLike,
) -> Grams:
    """Both Grams, block by block for layers with different maps of positions."""
    # layers by the shape of their maps: those of one group need no resampling
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, sums in enumerate(measured):
        positions = sums.inputs.shape[2:]
        groups.setdefault(positions, []).append(i)
    stacks = []
    for members in groups.values():
        together = [measured[i] for i in members]
        stacks.append(_joined(together))
    rows_in, rows_out = [], []
    # block rows of both Grams, one for each group
    for left in stacks:
        blocks = [_cross(left, right, examples, select, precision) for right in stacks]
        of_inputs, of_outputs = zip(*blocks, strict=True)
        rows_in.append(jnp.concatenate(of_inputs, 1))
        rows_out.append(jnp.concatenate(of_outputs, 1))
    inputs, outputs = jnp.concatenate(rows_in), jnp.concatenate(rows_out)
    # back from the order of the groups to that of execution
    order = _order(measured, groups)
    if order is None:
        return Grams(inputs, outputs)
    take = jnp.asarray(order)
    return Grams(inputs[take][:, take], outputs[take][:, take])


def _joined(measured: Sequence[Sums]) -> Sums:
    """Copies of several layers one after another."""
    # both sides of all layers of the group
    inputs, outputs = zip(*measured, strict=True)
    return Sums(jnp.concatenate(inputs), jnp.concatenate(outputs))


def _cross(
    left: Sums,
    right: Sums,
    examples: int,
    select: Resample,
    precision: jax.lax.PrecisionLike,
) -> Grams:
    """Positions are summed in the input side and averaged in the output side, as in the factors
    themselves.
    """
    left, right = common_positions(left, right, select)
    # A sums over positions, G averages over them: as in `kronecker`
    positions = math.prod(left.inputs.shape[2:])
    inputs = entry_products(left.inputs, right.inputs, precision) / examples
    outputs = entry_products(left.outputs, right.outputs, precision) / (examples * positions)
    return Grams(inputs, outputs)


def common_positions(
    left: Sums,
    right: Sums,
    select: Resample,
) -> tuple[Sums, Sums]:
    """Both on maps of one shape: axis by axis the smaller size, on one axis where they differ in
    number.
    """
    if left.inputs.ndim != right.inputs.ndim:
        left, right = _on_one_axis(left), _on_one_axis(right)
    # axis 0 is the copies, axis 1 the examples
    for axis in range(2, left.inputs.ndim):
        size = min(left.inputs.shape[axis], right.inputs.shape[axis])
        left = Sums(*(select(x, axis, size) for x in left))
        right = Sums(*(select(x, axis, size) for x in right))
    return left, right


def _on_one_axis(sums: Sums) -> Sums:
    """All positions on axis 2."""
    return Sums(*(x.reshape(*x.shape[:2], -1) for x in sums))


def entry_products(
    x: Array,
    y: Array,
    precision: jax.lax.PrecisionLike,
) -> Array:
    """`sum over all but the first axis of x_i y_j`."""
    axes = tuple(range(1, x.ndim))
    contracted, batched = (axes, axes), ((), ())
    return jax.lax.dot_general(
        x,
        y,
        (contracted, batched),
        precision=precision,
        out_sharding=replicated(x),
    )


def _order(measured: Sequence[Sums], groups: dict[tuple[int, ...], list[int]]) -> list[int] | None:
    """Where each layer's rows are once layers have been grouped; `None` if the order did not
    change.
    """
    copies = [sums.inputs.shape[0] for sums in measured]
    grouped = list(itertools.chain.from_iterable(groups.values()))
    starts, position = {}, 0
    # where the copies of a layer begin in the grouped order
    for i in grouped:
        starts[i] = position
        position += copies[i]
    order: list[int] = []
    for i, count in enumerate(copies):
        order.extend(range(starts[i], starts[i] + count))
    return None if order == sorted(order) else order
