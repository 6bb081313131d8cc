"""Means over the microbatches of a batch, one after another, so that the activations of one of them
are all that exists at a time.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._layout import zeros_of_type
from kfac_optax._types import PyTree
from kfac_optax.estimators.centring import is_centred
from kfac_optax.estimators.heads import count_examples, split_outputs
from kfac_optax.estimators.plan import Plan
from kfac_optax.estimators.spec import Spec
from kfac_optax.linalg.batch_parts import count_parts, parts_first


class Microbatches(NamedTuple):
    """A batch that is divided.

    Attributes:
      spec: of the estimator of one microbatch, which knows the weights of all.
      parts: the arrays that are cut, `[count, size, ...]`.
      join: these arrays of one microbatch, `[size, ...]`, to the arguments of the model.
      count: how many.
    """

    spec: Spec
    parts: list[jax.Array]
    join: Callable[[Sequence[Any]], tuple[PyTree, ...]]
    count: int


def check_size(where: str, size: Any) -> None:
    """Checks that a number of examples is one.

    >>> check_size("ggn", 0.5)
    Traceback (most recent call last):
    ValueError: ggn.at: microbatch_size=0.5; expected a whole number of examples, at least 1.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"{where}.at: microbatch_size={size!r}; expected a whole number of examples, at least 1."
        )


def divide(spec: Spec, params: PyTree, args: tuple[PyTree, ...], size: int) -> Microbatches:
    """Cuts every array whose axis 0 has the examples of the prediction.

    Raises:
      ValueError: the batch has no such parts, or the model does not see them as such.
    """
    where, kind = spec.kind.name, spec.kind
    # N of the whole batch, from shapes alone
    _, heads = split_outputs(kind, jax.eval_shape(spec.function, params, *args))
    examples = count_examples(kind, heads)
    leaves, treedef = jax.tree.flatten(args)
    cut = [getattr(x, "ndim", 0) > 0 and x.shape[0] == examples for x in leaves]
    if not any(cut) or examples % size:
        raise ValueError(
            f"{where}.at: microbatch_size={size} of a batch of {examples} examples; expected a "
            "divisor of it, and arguments of the model with the examples on axis 0."
        )
    # [N, ...] -> [count, size, ...]
    count = examples // size
    mine = [x for x, is_cut in zip(leaves, cut, strict=True) if is_cut]
    if any(count_parts(x, count) != count for x in mine):
        raise ValueError(
            f"{where}.at: microbatch_size={size} of {examples} examples that are sharded; expected "
            "a multiple of the number of devices, so that each has its share of every microbatch."
        )

    # one microbatch in the places of the arrays it was cut from, all else as it is
    def join(part: Sequence[Any]) -> tuple[PyTree, ...]:
        left = iter(part)
        pairs = zip(leaves, cut, strict=True)
        return treedef.unflatten([next(left) if is_cut else x for x, is_cut in pairs])

    batch = Microbatches(spec, [parts_first(x, count) for x in mine], join, count)
    _check_heads(batch, params, size)
    # weights are divided by their mean over the batch, which no microbatch knows
    means = _mean_weights(batch, params, heads)
    return batch._replace(spec=spec._replace(kind=kind._replace(mean_weights=means)))


def _check_heads(batch: Microbatches, params: PyTree, size: int) -> None:
    """Raises unless every head of a microbatch has its examples, and these alone."""
    kind = batch.spec.kind
    shapes = jax.eval_shape(
        lambda part: batch.spec.function(params, *batch.join(part)), [x[0] for x in batch.parts]
    )
    _, heads = split_outputs(kind, shapes)
    found = [count_examples(kind, [head]) for head in heads]
    if set(found) != {size}:
        raise ValueError(
            f"{kind.name}.at: microbatch_size={size}, but the heads of the prediction of a "
            f"microbatch have {found} examples. Expected examples on axis 0 of every argument that "
            "has them, and the same number of them in all heads."
        )
    if any(map(is_centred, heads)):
        raise ValueError(
            f"{kind.name}.at: microbatch_size={size} of a head with scores about their mean over "
            "the batch; expected a likelihood whose examples do not interact. Leave it out."
        )


def _mean_weights(batch: Microbatches, params: PyTree, heads: Sequence[Any]) -> Any:
    """Mean weight of every head over all microbatches, or `None` where there are no weights."""
    kind = batch.spec.kind
    if kind.losses or any(head.weights is None for head in heads):
        return None

    def of_part(part: Sequence[jax.Array]) -> list[jax.Array]:
        # compiled, all of the model but its weights is dead code
        _, mine = split_outputs(kind, batch.spec.function(params, *batch.join(part)))
        wide = [jnp.result_type(jnp.float32, h.weights, *h.natural) for h in mine]
        return [jnp.mean(h.weights.astype(dtype)) for h, dtype in zip(mine, wide, strict=True)]

    return tuple(jnp.mean(x) for x in jax.lax.map(of_part, batch.parts))


def mean_over(
    batch: Microbatches, function: Callable[[Spec, tuple[PyTree, ...], Any], tuple[PyTree, PyTree]]
) -> tuple[PyTree, PyTree]:
    """Of `function(spec, args, i) -> (means, rows)`, of every microbatch: the mean of the first,
    the second stacked on axis 0.
    """

    def of_part(part: tuple[Sequence[jax.Array], Any]) -> tuple[PyTree, PyTree]:
        arrays, i = part
        return function(batch.spec, batch.join(arrays), i)

    def add(total: PyTree, part: Any) -> tuple[PyTree, PyTree]:
        means, rows = of_part(part)
        return jax.tree.map(jnp.add, total, means), rows

    parts = batch.parts, jnp.arange(batch.count)
    # sums are carried from one microbatch to the next, rows are stacked
    shapes, _ = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    total, rows = jax.lax.scan(add, jax.tree.map(zeros_of_type, shapes), parts)
    return jax.tree.map(lambda x: x / batch.count, total), rows


def rows_apart(plan: Plan, statistics: PyTree) -> tuple[PyTree, dict[int, PyTree]]:
    """The statistics of a plan without those of its news that are rows of the batch, and these."""
    blocks, across = statistics
    means, rows = list(blocks), {}
    # a block that keeps columns of the batch gives (means, columns)
    for i, block in enumerate(plan.blocks):
        if block.absorb is not None and block.absorbs == "columns":
            means[i], rows[i] = blocks[i]
    return (means, across), rows


def with_rows(means: PyTree, rows: dict[int, PyTree]) -> PyTree:
    """The statistics of the whole batch, whose rows are those of all microbatches,
    `[count, copies, pullbacks, n, d]`.
    """
    blocks, across = list(means[0]), means[1]
    for i, mine in rows.items():
        blocks[i] = blocks[i], jax.tree.map(_in_order, mine)
    return blocks, across


def _in_order(x: jax.Array) -> jax.Array:
    # `[count, ..., size, d]` to `[..., size * count, d]`: examples as they were in the batch, with
    # the axis that may be sharded in front
    together = jnp.moveaxis(x, 0, -2)
    rows = together.reshape(*x.shape[1:-2], -1, x.shape[-1])
    # columns of a mean: divided by the root of the number of microbatches
    return rows / math.sqrt(x.shape[0])
