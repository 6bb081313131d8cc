"""Look-ups in a table that is made of others, as look-ups in those."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax.capture.kernels.expression import (
    DoesNotFit,
    Expression,
    Joined,
    Leaf,
    Negative,
    Product,
    Scaled,
    Stretched,
    Sum,
)
from kfac_optax.capture.kernels.parts import Multiply

_FILL = jax.lax.GatherScatterMode.FILL_OR_DROP


def is_lookup(eqn: Any) -> bool:
    """Whether a `gather` takes whole rows of a table, whose columns are its last axis."""
    table, out = eqn.invars[0].aval, eqn.outvars[0].aval
    numbers = eqn.params["dimension_numbers"]
    # offsets are the last axis of the output, one index names a row
    return (
        table.ndim == 2
        and out.ndim >= 2
        and tuple(numbers.offset_dims) == (out.ndim - 1,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, table.shape[1])
    )


def lookup(
    eqn: Any, kernel: Expression, indices: jax.Array, values: Mapping[int, jax.Array]
) -> jax.Array:
    """The `gather` of rows of a table.

    Args:
      eqn: the `gather`.
      kernel: what the table is made of.
      indices: `[..., 1]`.
      values: of the leaves, by the identity of what they are in the program.
    """
    mode, number = eqn.params["mode"], eqn.invars[0].aval.shape[0]
    # signed, so that numbers of rows can be subtracted
    tokens = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))
    if mode == jax.lax.GatherScatterMode.CLIP:
        tokens = jnp.clip(tokens, 0, number - 1)
    options = {"dimension_numbers": eqn.params["dimension_numbers"], "mode": mode}
    # NaN of rows that are missing would be what a further product multiplies
    options["fill_value"] = 0 if mode == _FILL else eqn.params["fill_value"]
    rows = _LookUp(values, options)(kernel, tokens)
    if mode != _FILL:
        return rows
    # rows that are in none of the parts have been zero up to here
    missing = (tokens < 0) | (tokens >= number)
    fill = eqn.params["fill_value"]
    if fill is None:
        fill = jnp.nan
    return jnp.where(missing, jnp.asarray(fill, rows.dtype), rows)


@dataclasses.dataclass
class _LookUp:
    """Rows `M[tokens]` for tables of the same look-up.

    Attributes:
      values: of the leaves, by identity.
      options: of a `gather`.
    """

    values: Mapping[int, jax.Array]
    options: dict[str, Any]

    def __call__(self, table: Expression, tokens: jax.Array) -> jax.Array:
        """`[..., columns]`, given tokens `[..., 1]`."""
        match table:
            case Leaf():
                value = self._value(table)
                sizes = (1, value.shape[1])
                return jax.lax.gather(value, tokens, slice_sizes=sizes, **self.options)
            case Sum():
                first, second = self(table.first, tokens), self(table.second, tokens)
                return first + second if table.sign > 0 else first - second
            case Scaled():
                rows, factor = self(table.of, tokens), self._value(table.factor)
                return (rows / factor if table.inverse else rows * factor).astype(rows.dtype)
            case Stretched(axes=(1,)):
                rows = self(table.of, tokens)
                return (rows * self._value(table.factor)).astype(rows.dtype)
            case Negative():
                return -self(table.of, tokens)
            case Product():
                return self._product(table, tokens)
            case Joined(axis=1, sizes=(_, *_)):
                return jnp.concatenate([self(part, tokens) for part in table.parts], -1)
            case Joined(axis=0, sizes=(_, *_)):
                return self._joined_rows(table, tokens)
            case _:
                raise DoesNotFit(table.value)

    def _value(self, leaf: Leaf) -> jax.Array:
        value = self.values[id(leaf.value)]
        return value if leaf.dtype is None else value.astype(leaf.dtype)

    def _product(self, table: Product, tokens: jax.Array) -> jax.Array:
        """`(A B)[tokens] = A[tokens] B`."""
        first, second, (row, column) = table.names
        sides = [(table.first, first), (table.second, second)]
        # the side that has the rows, as `[rows, between]`
        if row not in first:
            sides.reverse()
        (near, near_names), (far, far_names) = sides
        if near_names[:1] != (row,) or len(near_names) != 2 or row in far_names:
            raise DoesNotFit(table.value)
        between = near_names[1]
        if set(far_names) != {between, column}:
            raise DoesNotFit(table.value)
        rows = self(near, tokens)
        # names that neither side has
        fresh = itertools.count(max(*first, *second, row, column) + 1)
        batch = tuple(next(fresh) for _ in range(rows.ndim - 1))
        multiply = Multiply(self.values, jnp.einsum, fresh)
        return multiply(rows, (*batch, between), far, far_names, (*batch, column))

    def _joined_rows(self, table: Joined, tokens: jax.Array) -> jax.Array:
        """Each part looks up its own tokens, and has zeros for those of others."""
        inside = dataclasses.replace(self, options=self.options | {"mode": _FILL, "fill_value": 0})
        starts = [0, *itertools.accumulate(table.sizes)]
        sized = zip(table.parts, starts, table.sizes, strict=False)
        parts = [(part, start, size) for part, start, size in sized if size]
        rows = []
        for part, start, size in parts:
            # beyond the end on both sides, as a negative number would count from behind
            own = jnp.where(tokens < start, size, tokens - start)
            rows.append(inside(part, own))
        return sum(rows[1:], rows[0])
