"""Whether a block keeps to what `Block` says, from shapes alone: nothing is computed."""

from typing import Any

import jax

from kfac_optax._types import Block, Bucket, PyTree
from kfac_optax.engine.state import block_of_bucket


def check_block(where: str, bucket: Bucket, dtype: Any) -> None:
    """Checks the functions of a bucket's block against each other.

    These are `init`, `factorize`, `solve`, `root_solve`, `refresh` and `due`.

    Args:
      where: for errors.
      bucket: made with a block.
      dtype: of the statistics.

    Raises:
      ValueError: a function returns other shapes than the protocol asks for, or a factorisation
        does not exist in a dtype narrower than float32.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> block = ko.kronecker()._replace(name="mine", solve=lambda inverse, v, damping: v.T)
    >>> layer = ko.testing.dense_layer(2, 3)
    >>> check_block("kfac", Bucket("dense_2x3", (layer,), (2, 3), block), jnp.float32)
    Traceback (most recent call last):
    ValueError: kfac: block 'mine' of dense_2x3: solve(inverse, V, damping) returned float32[3,2]; expected float32[2,3], ...
    """
    block, (p, q) = block_of_bucket(bucket), bucket.shape
    here = f"{where}: block {block.name!r} of {bucket.name}"
    # one layer of the bucket, no copies in front
    statistic = jax.eval_shape(lambda: block.init(bucket.layers[0], dtype))
    number = jax.ShapeDtypeStruct((), dtype)
    inverse = jax.eval_shape(block.factorize, statistic, number)
    _check_narrow(here, block, statistic, number)
    _check_arrays(f"{here}: init(layer, dtype)", statistic)
    _check_arrays(f"{here}: factorize(statistic, damping)", inverse)
    # solve and root_solve: from V [p, q] to V
    v = jax.ShapeDtypeStruct((p, q), dtype)
    solved = jax.eval_shape(block.solve, inverse, v, number)
    _check_same(f"{here}: solve(inverse, V, damping)", solved, v, "what V is")
    if block.root_solve is not None:
        root = jax.eval_shape(block.root_solve, inverse, v, number)
        _check_same(f"{here}: root_solve(inverse, Z, damping)", root, v, "what Z is")
    _check_refresh(here, block, statistic, inverse, number)
    _check_due(here, block, statistic, inverse, number)


def _check_narrow(here: str, block: Block, statistic: PyTree, number: Any):
    """Raises where a factorisation has no form in half precision: found when it is lowered."""
    if number.dtype.itemsize >= 4:
        return
    # nothing is lowered inside of `shard_map`: out of its mesh, and of shapes that know of none
    nowhere = jax.sharding.AbstractMesh((), ())
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), statistic)
    try:
        with jax.sharding.use_abstract_mesh(nowhere):
            jax.jit(block.factorize).lower(plain, number)
    except NotImplementedError as error:
        raise ValueError(
            f"{here}: factorize(statistic, damping) cannot be computed in {number.dtype.name}, the "
            f"factor_dtype. Leave factor_dtype out (float32 at least), or take a block "
            "without factorisations, such as rank_one(). What devices send each other can be "
            "narrower: Placement(statistics_dtype=)."
        ) from error


def _check_refresh(here: str, block: Block, statistic: PyTree, inverse: PyTree, number: Any):
    if block.refresh is None:
        return
    # a refresh makes of what is held what factorize makes of nothing
    count = jax.ShapeDtypeStruct((), "int32")
    new = jax.eval_shape(block.refresh, inverse, statistic, number, count)
    name = f"{here}: refresh(inverse, statistic, damping, count)"
    _check_same(name, new, inverse, "what factorize returned")


def _check_due(here: str, block: Block, statistic: PyTree, inverse: PyTree, number: Any):
    if block.due is None:
        return
    count = jax.ShapeDtypeStruct((), "int32")
    asked = jax.eval_shape(block.due, inverse, statistic, number, count)
    name = f"{here}: due(inverse, statistic, damping, count)"
    # due, and what is held where it is not
    expected = jax.ShapeDtypeStruct((), "bool"), inverse
    _check_same(name, asked, expected, "a bool and what factorize returned")


def check_measured(where: str, bucket: Bucket, measured: PyTree, held: PyTree) -> None:
    """Checks that a statistic can be averaged into the one that is kept.

    Args:
      where: for errors.
      bucket: made with a block.
      measured: what `measure` returned for the bucket, copies in front.
      held: what `init` returned for it, copies in front.

    Raises:
      ValueError: structure or shapes differ; they would be broadcast, or fail somewhere else.
    """
    block = block_of_bucket(bucket)
    here = f"{where}: block {block.name!r} of {bucket.name}: measure(a, g, use)"
    expected = "what init returned (copies of the bucket in front)"
    _check_same(here, measured, held, expected, dtypes=False)


def _check_same(
    what: str, got: PyTree, expected: PyTree, meaning: str, *, dtypes: bool = True
) -> None:
    def kinds(tree: PyTree) -> list[tuple]:
        return [(x.shape, x.dtype if dtypes else None) for x in jax.tree.leaves(tree)]

    # structure first, so that leaves are paired rightly
    same = jax.tree.structure(got) == jax.tree.structure(expected)
    if not same or kinds(got) != kinds(expected):
        raise ValueError(
            f"{what} returned {_described(got)}; expected {_described(expected)}, {meaning}."
        )


def _check_arrays(what: str, tree: PyTree) -> None:
    if not jax.tree.leaves(tree):
        raise ValueError(f"{what} returned {tree!r}; expected a tree with at least one array.")


def _described(tree: PyTree) -> str:
    if hasattr(tree, "shape"):
        # a tree as its type and its leaves
        return f"{tree.dtype}[{','.join(map(str, tree.shape))}]"
    paths = jax.tree_util.tree_leaves_with_path(tree)
    parts = [f"{jax.tree_util.keystr(path)} {_described(x)}" for path, x in paths]
    return f"{type(tree).__name__}({', '.join(parts)})"
