"""Gradients to updates: every block solves for its layers, the coupling makes of that what it
knows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._parts import boxes_left, emptied, within_box
from kfac_optax._tree import all_finite, gather, named_leaves, replace_leaves, scatter
from kfac_optax._types import Layer, PyTree, System, Vector
from kfac_optax.engine.placed import inverses_of_all, solve_placed
from kfac_optax.engine.slopes import FromRows, in_one_scale, of_matrices, of_rows
from kfac_optax.engine.state import CurvatureState, Step, block_of_bucket
from kfac_optax.linalg.powers import Scaled

Rows = dict[Layer, tuple[jax.Array, jax.Array]]


class Preconditioned(NamedTuple):
    """An update in parts, and what is known of it."""

    parts: list[dict[str, jax.Array]]  # leaves by name; one part, their sum, unless `separate`
    share: jax.Array  # shape=(): that the coupling has in it
    finite: jax.Array  # shape=(), dtype=bool: whether all of it is
    slopes: Scaled | None  # `<U_i, V_i>` of every matrix, where they are asked for


def precondition(
    step: Step,
    state: CurvatureState,
    leaves: dict[str, jax.Array],
    dtype: Any,
    curvature: Any,
    axis_name: Any,
    rows: Rows | None,
    finite: jax.Array,
    separate: bool,
    sloped: bool = False,
) -> Preconditioned:
    """The update. One that is not finite, or `finite` that is false, gives zeros.

    `rows`: see `_from_rows`; `sloped`: of an update without a coupling.
    """

    def fine(vector: Vector) -> Vector:
        if step.divided is not None:
            return solve_placed(step, step.divided, state.factors, state.inverses, vector)
        # of what couplings solve for, only the gradient itself is a product of rows
        known = from_rows if vector is gradient else {}
        solved = []
        for bucket, v in zip(step.buckets, vector, strict=True):
            if bucket.name in known:
                solved.append(known[bucket.name].update)
                continue
            solve = jax.vmap(block_of_bucket(bucket).solve, (0, 0, None))
            solved.append(solve(state.inverses[bucket.name], v, step.damping))
        return solved

    with jax.named_scope("kfac/precondition"):
        gradient = [gather(bucket, leaves, dtype) for bucket in step.buckets]
        from_rows = _from_rows(step, state, rows, dtype, axis_name) if rows else {}
        if step.coupling is None:
            parts = [fine(gradient)]
        else:
            system = _system(step, state, gradient, fine, leaves, curvature, axis_name)
            parts = step.coupling.apply(state.coarse.coarse_inverse, system)
        share = _share(parts)
        slopes = _slopes(step, parts[0], gradient, from_rows, axis_name) if sloped else None
        # added up where layers are stacked: leaf by leaf it would be an operation for each
        parts = parts if separate else [_sum(parts)]
        # here and not leaf by leaf: few arrays depend on all of them, which XLA compiles far sooner
        finite = finite & all_finite(parts)
        # numbers of shared leaves that no layer has: checked with the parts, and in the first alone
        boxes = boxes_left(step.layers)
        rest = {}
        for name, left in boxes.items():
            rest[name] = [within_box(leaves[name], box) for box in left]
        finite = finite & all_finite(rest)
        parts = jax.tree.map(lambda x: jnp.where(finite, x, 0), parts)
        first = leaves | {name: jnp.where(finite, leaves[name], 0) for name in boxes}
        others = leaves | {name: jnp.zeros_like(leaves[name]) for name in boxes}
    named = []
    for i, part in enumerate(parts):
        named.append(_named(step, part, others if i else first, finite))
    return Preconditioned(named, share, finite, slopes)


def _slopes(
    step: Step,
    update: Vector,
    gradient: Vector,
    from_rows: dict[str, FromRows],
    axis_name: Any,
) -> Scaled:
    """`<U_i, V_i>` of all matrices, from few rows where they are known: of the devices of a mapped
    axis each has some.
    """
    found = []
    for bucket, u, v in zip(step.buckets, update, gradient, strict=True):
        known = from_rows.get(bucket.name) if axis_name is None else None
        if known is not None and known.few:
            found.append(of_rows(known))
        else:
            found.append(of_matrices(u, v))
    return in_one_scale(found)


def _share(parts: list[Vector]) -> jax.Array:
    """Norm of what comes after the first part over the norm of the sum."""
    if len(parts) == 1:
        return jnp.zeros((), jnp.float32)
    # what the coupling adds, its parts summed up for every bucket
    added = _sum(parts[1:])
    changed, total = 0.0, 0.0
    for fine, more in zip(parts[0], added, strict=True):
        changed += jnp.sum(jnp.square(more))
        total += jnp.sum(jnp.square(fine + more))
    return jnp.sqrt(changed / jnp.where(total > 0, total, 1))


def _sum(parts: list[Vector]) -> Vector:
    return [sum(xs[1:], xs[0]) for xs in zip(*parts, strict=True)]


def _named(
    step: Step,
    vector: Vector,
    leaves: dict[str, jax.Array],
    some: jax.Array | None = None,
) -> dict[str, jax.Array]:
    named: dict[str, jax.Array] = {}
    for bucket, matrices in zip(step.buckets, vector, strict=True):
        named |= scatter(bucket, matrices, leaves | named, some)
    return named


def _from_rows(
    step: Step, state: CurvatureState, rows: Rows, dtype: Any, axis_name: Any
) -> dict[str, FromRows]:
    """Preconditioned gradients of the buckets that take rows
    `(a [copies, R, p], g [copies, R, q])`, by bucket.
    """
    known: dict[str, FromRows] = {}
    for bucket in step.buckets:
        solve_rows = block_of_bucket(bucket).solve_rows
        if solve_rows is None or any(layer not in rows for layer in bucket.layers):
            continue
        # a [copies, R, p] and g [copies, R, q]; sum_n a_n g_n^T is the gradient
        of_layers = [rows[layer] for layer in bucket.layers]
        a, g = (_stacked(xs, dtype) for xs in zip(*of_layers, strict=True))
        solved = jax.vmap(solve_rows, (0, 0, 0, None))(
            state.inverses[bucket.name], a, g, step.damping
        )
        if solved is None:
            continue
        update, of_rows_alone = solved
        # linear in the rows, so that the mean over devices is that of the gradient
        if axis_name is not None:
            update = jax.lax.pmean(update, axis_name)
        known[bucket.name] = FromRows(update, of_rows_alone, (a, g))
    return known


def _stacked(rows: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """Rows `[copies, R, d]` of several layers together; zeros make up for layers with fewer of
    them.
    """
    longest = max(x.shape[1] for x in rows)
    return jnp.concatenate(
        [jnp.pad(x.astype(dtype), ((0, 0), (0, longest - x.shape[1]), (0, 0))) for x in rows]
    )


def _system(step, state, gradient, fine, leaves, curvature, axis_name) -> System:
    sizes = state.coarse.coarse_sizes
    # rows of the coarse matrix on one side, buckets of layers on the other
    between = _Between(step, [v.shape for v in gradient])
    batch = _Batch(step, leaves, curvature, axis_name)
    held = inverses_of_all(step, state.factors, state.inverses)
    return System(
        gradient,
        fine,
        between.restrict,
        between.prolong,
        between.matrices,
        between.replace,
        batch.product,
        lambda prolong, count: batch.coarse(prolong, count, sizes.dtype),
        step.fine(state.factors, held, sizes).inverses,
        step.damping,
        sizes,
    )


class _Between(NamedTuple):
    """From vectors to rows and back."""

    step: Step
    shapes: list[tuple[int, ...]]

    def restrict(self, vector: Vector) -> jax.Array:
        rows = self.step.rows()
        # R v: of every copy the sum of its entries
        restricted = jnp.concatenate([jnp.sum(vector[i], (1, 2)) for i in self.coupled()])
        return restricted if _in_order(rows) else restricted[np.argsort(rows)]

    def prolong(self, values: jax.Array) -> Vector:
        rows, start = self.step.rows(), 0
        by_bucket = values if _in_order(rows) else values[rows]
        # layers outside the coupling get zero
        vector = [jnp.zeros((), values.dtype)] * len(self.shapes)
        for i in self.coupled():
            # [copies, 1, 1]: all entries of a layer get its number
            vector[i] = by_bucket[start : start + self.shapes[i][0], None, None]
            start += self.shapes[i][0]
        return [jnp.broadcast_to(x, shape) for x, shape in zip(vector, self.shapes, strict=True)]

    def matrices(self, vector: Vector) -> list[jax.Array]:
        return [vector[i][k] for i, k in self.step.places()]

    def replace(self, vector: Vector, matrices: Sequence[jax.Array]) -> Vector:
        of_place = dict(zip(self.step.places(), matrices, strict=True))
        new = list(vector)
        for i in self.coupled():
            new[i] = jnp.stack([of_place[i, k] for k in range(len(vector[i]))])
        return new

    def coupled(self) -> list[int]:
        return [i for i, bucket in enumerate(self.step.buckets) if bucket.layers[0].coupled]


def _in_order(rows: np.ndarray) -> bool:
    return np.array_equal(rows, np.arange(len(rows)))


class _Batch(NamedTuple):
    """The exact curvature of this step's batch on what blocks cover."""

    step: Step
    leaves: dict[str, jax.Array]
    curvature: Any
    axis_name: Any

    def product(self, vector: Vector) -> Vector:
        # F v over the whole tree, cut into buckets again
        products = named_leaves(
            self._given().vector_product(self._as_tree(vector), axis_name=self.axis_name)
        )
        return [
            gather(bucket, products, v.dtype)
            for bucket, v in zip(self.step.buckets, vector, strict=True)
        ]

    def coarse(self, prolong: Callable[[jax.Array], Vector], count: int, dtype: Any) -> jax.Array:
        # the direction of row i: its unit vector, spread over the entries of a layer
        def direction(row: jax.Array) -> PyTree:
            return self._as_tree(prolong((jnp.arange(count) == row).astype(dtype)))

        form = self._given().quadratic_form(direction, count=count, axis_name=self.axis_name)
        return form.astype(dtype)

    def _as_tree(self, vector: Vector) -> PyTree:
        """Like the parameters, zeros where no block is."""
        named = _named(self.step, vector, emptied(self.leaves, boxes_left(self.step.layers)))
        return replace_leaves(jax.tree.map(jnp.zeros_like, self.curvature.params), named)

    def _given(self) -> Any:
        if self.curvature is None:
            assert self.step.coupling is not None
            raise ValueError(
                f"{self.step.coupling.name}: this coupling takes exact products with the curvature "
                "of the batch in every step, but got curvature=None. Pass "
                "curvature=fisher.at(params, *args, key=key) every time (statistics still follow "
                "curvature_every), or use the additive correction."
            )
        return self.curvature
