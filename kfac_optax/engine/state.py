"""State of a preconditioner, and what the parts of one update share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import Block, Bucket, Coupling, Fine, Layer, PyTree
from kfac_optax._validate import Checked
from kfac_optax.engine.grouping import Grouping
from kfac_optax.engine.placement import Placement

# Of all states of the package together, as `describe_state` saves it: one more whenever a field, a
# shape or the meaning of an array changes.
STATE_FORMAT = 2


class CoarseState(NamedTuple):
    """State of the coupling between layers, rows in order of execution."""

    coarse_factors: PyTree
    coarse_inverse: PyTree
    coarse_sizes: jax.Array  # shape=(L,): number of parameters of each layer
    coarse_index: dict[str, jax.Array]  # rows of each layer, by path


class OwnFactors(NamedTuple):
    """Statistics of a bucket that only the devices that factorise them have: those of one device
    behind another's, in places of equal number.
    """

    own: PyTree  # [W places, ...]; inside `shard_map` and `pmap` [places, ...]
    counts: jax.Array  # shape=(groups, m), dtype=int32: how many each of the devices has


class CurvatureState(NamedTuple):
    """State of `scale_by_curvature`. Buckets of equal layers are stacked on axis 0."""

    kfac_count: Any  # shape=(), dtype=int32: steps
    curvature_count: jax.Array  # shape=(), dtype=int32: statistics accepted
    # shape=(), dtype=int32: statistics dropped because they were not finite
    skipped_statistics: jax.Array
    # shape=(), dtype=int32: factorisations dropped because they were not finite
    failed_inverses: jax.Array
    # shape=(), dtype=int32: steps since the last factorisation (with `stagger`: of any part)
    inverse_age: Any
    damping: jax.Array  # shape=(), dtype=float32: of the last step
    # shape=(), dtype=float32: norm of the coarse part over norm of the sum, last step
    coarse_share: jax.Array
    factors: PyTree  # statistics of the block, by bucket; `OwnFactors` where they are divided
    inverses: PyTree  # factorised inverses, by bucket
    coarse: Any  # CoarseState, or () without a coupling
    non_finite_updates: (
        Any  # shape=(), dtype=int32: steps whose update was not finite, and became zero
    )
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


class GradientCounts(NamedTuple):
    """What a preconditioner that sees gradients alone has counted, each `shape=(), dtype=int32`."""

    gradient_count: Any  # gradients whose update was finite; periods and schedules follow it
    skipped_gradients: Any  # gradients that were not finite: nothing changed, the update was zero
    skipped_statistics: Any  # products of finite gradients that were not finite, and were dropped
    failed_inverses: Any  # factorisations that failed; the last good one was kept
    non_finite_updates: Any  # updates of finite gradients that were not finite, and became zero


class GNBState(NamedTuple):
    """State of `gnb_estimator`, each `shape=(), dtype=int32`."""

    estimates: Any
    skipped_estimates: Any  # that were not finite, and became zero


class SampleSpaceState(NamedTuple):
    """State of `smw` and `spring`."""

    previous_update: PyTree  # last direction, float32 or wider; None without momentum
    sample_count: Any  # shape=(), dtype=int32: steps
    # shape=(), dtype=int32: steps left out, since something was not finite or nothing counted
    skipped_steps: jax.Array
    inexact_solves: jax.Array  # shape=(), dtype=int32: that left more than a tenth of the gradient
    solve_error: jax.Array  # shape=(), dtype=float32: |g - (F + damping I) x| / |g|, last solve
    given: dict[str, Checked]  # hyperparameters, as far as they made sense


class Step(NamedTuple):
    """What the parts of one update share."""

    grouping: Grouping
    coupling: Coupling | None
    damping: jax.Array
    placement: Placement | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """In order of execution."""
        return self.grouping.layers

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The same layers, equal ones together."""
        return self.grouping.buckets

    @property
    def divided(self) -> Placement | None:
        """The placement, where it divides inverses over devices."""
        placement = self.placement
        return placement if placement is not None and placement.divided else None

    @property
    def owned(self) -> Placement | None:
        """The placement, where it divides factors over devices."""
        placement = self.placement
        return placement if placement is not None and placement.owned else None

    @property
    def copies(self) -> dict[str, int]:
        """Number of matrices of every bucket."""
        return {bucket.name: bucket.copies for bucket in self.buckets}

    def rows(self) -> np.ndarray:
        """Row in the coarse matrix (order of execution) of every coupled layer in bucket order."""
        first, start = {}, 0
        for layer in self.layers:
            if layer.coupled:
                first[layer] = start
                start += layer.copies
        rows: list[np.ndarray] = []
        for bucket in self.buckets:
            rows += [first[x] + np.arange(x.copies) for x in bucket.layers if x.coupled]
        return np.concatenate(rows)

    def places(self) -> list[tuple[int, int]]:
        """Bucket of every row and its position there, rows in order of execution."""
        in_buckets: list[tuple[int, int]] = []
        for i, bucket in enumerate(self.buckets):
            if bucket.layers[0].coupled:
                in_buckets += [(i, k) for k in range(bucket.copies)]
        return [in_buckets[i] for i in np.argsort(self.rows())]

    def fine(self, factors: PyTree, inverses: PyTree, sizes: jax.Array) -> Fine:
        """What couplings may use of the blocks' factors and of what is held for them, by bucket
        both.
        """
        places = self.places()

        def row_of(by_bucket: PyTree, row: int) -> PyTree:
            bucket, position = places[row]
            return jax.tree.map(lambda x: x[position], by_bucket[self.buckets[bucket].name])

        return Fine(
            lambda row: row_of(factors, row), lambda row: row_of(inverses, row), self.damping, sizes
        )


def own_values(statistic: PyTree) -> PyTree:
    """The statistics of a bucket as far as they are kept here."""
    return statistic.own if isinstance(statistic, OwnFactors) else statistic


def block_of_bucket(bucket: Bucket) -> Block:
    """The block of a bucket that was made with one."""
    assert bucket.block is not None
    return bucket.block


def start_of_bucket(bucket: Bucket, dtype: Any) -> PyTree:
    """Statistics of a bucket before anything was measured, `[copies, ...]`."""
    # the start of one layer, for every copy
    one = block_of_bucket(bucket).init(bucket.layers[0], dtype)
    return jax.tree.map(lambda x: jnp.repeat(x[None], bucket.copies, 0), one)


def find_states(opt_state: PyTree, kind: type) -> list[Any]:
    """All parts of an optimizer state that are of one kind, in tree order."""
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, kind):
            found.append(node)
        return False  # go on inside: a clip wraps the curvature's own state

    jax.tree.leaves(opt_state, is_leaf=visit)
    return found


def the_state(opt_state: PyTree, kind: type, where: str) -> Any:
    """The only part of one kind.

    Raises:
      ValueError: there is none, or several.
    """
    found = find_states(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"{where}: found {len(found)} {kind.__name__} in the optimizer state; expected exactly "
            "one. Pass the state of one K-FAC transformation (of one group, under optax.partition)."
        )
    return found[0]
