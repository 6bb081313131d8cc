"""What blocks hold, as one block-diagonal operator on trees like the parameters."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._parts import boxes_left, emptied
from kfac_optax._tree import (
    gather,
    named_leaves,
    replace_leaves,
    scatter,
    wide_dtype,
)
from kfac_optax._types import Block, Bucket, Layer, Layers, PyTree
from kfac_optax._validate import check_choice
from kfac_optax.engine.choice import BlockOf, blocks_of, cover
from kfac_optax.engine.grouping import group_layers
from kfac_optax.engine.state import (
    CoarseState,
    CurvatureState,
    OwnFactors,
    block_of_bucket,
    own_values,
)
from kfac_optax.linalg.in_order import after

LINEAR = ("pass", "diagonal", "raise")  # grafting is no linear map


class BlockInverse(NamedTuple):
    """`(F + damping I)^{-1}` block by block, with the identity where no block is."""

    buckets: tuple[Bucket, ...]
    inverses: dict[str, PyTree]  # by bucket
    damping: jax.Array


def covered_with(
    where: str,
    layers: Layers,
    block: Block | BlockOf | None,
    normalization: str,
    uncovered: str,
    exact: bool = False,
) -> tuple[Layers, BlockOf]:
    """The layers that have a block, and which one, from the words that presets have too.

    `exact`: damped exactly unless `block` says otherwise, however wide; else as in `kfac`.
    """
    check_choice(where, "uncovered", uncovered, LINEAR)
    layers = cover(layers, uncovered=uncovered, normalization=normalization, where=where)
    chooses = block is not None and not isinstance(block, Block)
    inverse = "eigh" if exact and not chooses else "auto"
    return layers, blocks_of(block, inverse=inverse, normalization=normalization)


def check_buckets(where: str, buckets: tuple[Bucket, ...], state: CurvatureState) -> None:
    """Checks that a state was made with these layers and blocks.

    Raises:
      ValueError: other buckets, or an inverse of another structure.
    """
    expected = {bucket.name for bucket in buckets}
    advice = "Pass the layers, block, normalization and uncovered that the preconditioner had"
    # other words leave other layers, and those make other buckets
    if expected != set(state.factors):
        raise ValueError(
            f"{where}: the state holds {', '.join(sorted(state.factors))}; expected "
            f"{', '.join(sorted(expected))}. {advice}."
        )
    for bucket in buckets:
        block, number = block_of_bucket(bucket), jnp.ones(())
        factors, held = state.factors[bucket.name], state.inverses[bucket.name]
        _check_whole(where, bucket, factors, held)
        try:
            # only structures are compared: nothing is computed
            fresh = jax.eval_shape(jax.vmap(block.factorize, (0, None)), factors, number)
            same = jax.tree.structure(fresh) == jax.tree.structure(held)
        except (AttributeError, TypeError, ValueError):  # factors that the block cannot read
            same = False
        if not same:
            raise ValueError(
                f"{where}: the state of {bucket.name} holds a {type(held).__name__}, which is "
                f"not what block {block.name!r} makes. {advice}; for a preset with inverse='eigh' "
                "it is block=blocks_of(None, inverse='eigh'), and so for 'cholesky'. What takes no "
                "block= reads inverse='eigh' alone: make the preconditioner with it."
            )


def _check_whole(where: str, bucket: Bucket, factors: PyTree, held: PyTree) -> None:
    """Raises where what a bucket has is divided over devices."""
    for what, tree in (("factors", own_values(factors)), ("inverses", held)):
        kept = {x.shape[0] for x in jax.tree.leaves(tree)}
        # places may be as many as matrices, and hold others
        divided = what == "factors" and isinstance(factors, OwnFactors)
        if divided or kept - {bucket.copies}:
            places = f"{max(kept)} places for" if divided else f"{max(kept)}"
            raise ValueError(
                f"{where}: the state holds {places} {what} of {bucket.name}; expected "
                f"{bucket.copies}, one for each matrix. It is divided over devices: pass "
                "whole_state(opt_state, placement), or run with a placement that does not "
                "divide it (worker_fraction=1, statistics='averaged')."
            )


def of_state(where: str, state: CurvatureState, layers: Layers, block_of: BlockOf) -> BlockInverse:
    """What a state holds for its layers.

    Raises:
      ValueError: it was made with other ones, or with a coupling, of which blocks know nothing.
    """
    if isinstance(state.coarse, CoarseState):
        raise ValueError(
            f"{where}: the state has a coupling between layers, which has no square root or "
            "determinant here; expected that of a preconditioner without one, such as kfac. "
            "inverse_product takes coupling=."
        )
    buckets = group_layers(layers.layers, block_of).buckets
    check_buckets(where, buckets, state)
    return BlockInverse(buckets, state.inverses, state.damping)


def solve_tree(operator: BlockInverse, tree: PyTree) -> PyTree:
    """`(F + damping I)^{-1} v`."""
    leaves, dtype = _leaves(operator, tree), wide_dtype(operator.inverses)
    named: dict[str, jax.Array] = {}
    for bucket in operator.buckets:
        solve = jax.vmap(block_of_bucket(bucket).solve, (0, 0, None))
        # V [copies, p, q], and (F_b + damping I)^{-1} V for every copy
        v = gather(bucket, leaves, dtype)
        solved = solve(operator.inverses[bucket.name], v, operator.damping)
        named |= scatter(bucket, solved, leaves | named)
    return replace_leaves(tree, named)


def root_trees(where: str, operator: BlockInverse, trees: PyTree) -> PyTree:
    """`R z` with `R R^T = (F + damping I)^{-1}`, for a stack of trees `[n, ...]`.

    The stack is inside so that what blocks decompose for a root is decomposed once for all.

    Raises:
      ValueError: a block has no root.
    """
    leaves, dtype = _leaves(operator, trees), wide_dtype(operator.inverses)
    named: dict[str, jax.Array] = {}
    solved: PyTree = ()
    for bucket in operator.buckets:
        root = block_of_bucket(bucket).root_solve
        if root is None:
            raise _missing(where, bucket, "root_solve", "square root")
        # one root is decomposed after another: their workspaces need not exist at once
        ready = after(operator.inverses[bucket.name], solved)
        z = jax.vmap(lambda x, bucket=bucket: gather(bucket, x, dtype))(leaves)
        # copies [*, n] outside, noise [n] inside: z is [n, copies, p, q]
        of_copy = jax.vmap(root, (None, 0, None))
        solved = jax.vmap(of_copy, (0, 1, None), 1)(ready, z, operator.damping)
        named |= jax.vmap(lambda x, y, bucket=bucket: scatter(bucket, x, y))(solved, leaves | named)
    return replace_leaves(trees, named)


def logdet(where: str, operator: BlockInverse) -> jax.Array:
    """`log det(F + damping I)` over all parameters with a block.

    Raises:
      ValueError: a block has no determinant.
    """
    total = jnp.zeros((), wide_dtype(operator.inverses))
    for bucket in operator.buckets:
        of_block = block_of_bucket(bucket).logdet
        if of_block is None:
            raise _missing(where, bucket, "logdet", "determinant")
        shape, ready = bucket.shape, after(operator.inverses[bucket.name], total)
        # log det of a block-diagonal matrix: the sum over blocks and copies
        each = jax.vmap(lambda x, of=of_block, shape=shape: of(x, operator.damping, shape))(ready)
        total = total + jnp.sum(each)
    return total


def covered_names(operator: BlockInverse) -> list[str]:
    """Parameters with a block, by path."""
    # once each: layers may have parts of one parameter
    names: dict[str, None] = {}
    for layer in layers_of(operator):
        names |= dict.fromkeys(layer.leaves)
    return list(names)


def covered_only(operator: BlockInverse, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The leaves with a block, zero in boxes that no layer has of those that layers share out."""
    mine = {name: leaves[name] for name in covered_names(operator)}
    return emptied(mine, boxes_left(layers_of(operator)))


def layers_of(operator: BlockInverse) -> list[Layer]:
    """All layers with a block."""
    layers: list[Layer] = []
    for bucket in operator.buckets:
        layers += bucket.layers
    return layers


def _leaves(operator: BlockInverse, tree: PyTree) -> dict[str, jax.Array]:
    leaves = named_leaves(tree)
    absent = [name for name in covered_names(operator) if name not in leaves]
    if absent:
        raise ValueError(
            f"kfac_optax: the vector has no leaf {absent[0]!r}, but {', '.join(leaves)}; expected "
            "a tree like the parameters that `layers` was made from."
        )
    return leaves


def _missing(where: str, bucket: Bucket, field: str, what: str) -> ValueError:
    block = block_of_bucket(bucket)
    return ValueError(
        f"{where}: layer {bucket.layers[0].path!r} has block {block.name!r}, which offers no {what} "
        f"({field} is None); expected a block with one, such as kronecker(). Give it one, "
        f"block._replace({field}=...), or the layer another block."
    )
