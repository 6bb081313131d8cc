"""Parameter trees to canonical matrices and back: the only place that knows paths and kernel
layout.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._layout import as_replicated, laid_out
from kfac_optax._parts import boxes_left, emptied
from kfac_optax._places import consecutive
from kfac_optax._reasons import NOT_REAL, NOT_USED
from kfac_optax._types import Block, Bucket, Layer, Layers, Part, PyTree

_SEVERAL = 4  # layers of a bucket from which on a kernel for each of them counts


def path_name(path: tuple) -> str:
    """Normalised name of a tree path: keys joined by `/`, without the `.value` that variable boxes
    add.

    >>> tree = {"Dense_0": {"kernel": 1.0}}
    >>> [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ['Dense_0/kernel']
    """
    # NNX states show `.value` in `init` but not in `update`, and partitioned linen parameters are
    # boxed too.
    last = path[-1] if path else None
    if isinstance(last, jax.tree_util.GetAttrKey) and last.name in ("value", "raw_value"):
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, jax.Array]:
    """Leaves of a tree by normalised path, in tree order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in pairs}


def replace_leaves(tree: PyTree, new: Mapping[str, jax.Array]) -> PyTree:
    """`tree` with the leaves named in `new` exchanged, each cast to the dtype of the leaf it
    replaces, and where mesh axes are explicit laid out as that is.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    # states of masked transformations have other leaves: only what is named is replaced
    leaves = []
    for path, leaf in paths:
        name = path_name(path)
        if name in new:
            leaf = laid_out(new[name].astype(leaf.dtype), leaf)
        leaves.append(leaf)
    return jax.tree.unflatten(treedef, leaves)


def make_buckets(
    layers: Iterable[Layer],
    block_of: Callable[[Layer], Block] | None = None,
) -> tuple[Bucket, ...]:
    """Groups layers of equal kind, canonical shape and block, in order of first appearance."""
    groups: dict[tuple, list[Layer]] = {}
    # dictionaries keep the order of execution
    for layer in layers:
        block = None if block_of is None else block_of(layer)
        # a bias row changes the factors, so 10 inputs with bias and 11 without stay apart, and
        # the number of channels those of a convolution; couplings see all layers of a bucket or
        # none
        what = layer.kind, layer.shape, layer.bias is not None, layer.channels
        key = (*what, block, layer.coupled)
        groups.setdefault(key, []).append(layer)
    buckets: dict[str, Bucket] = {}
    for (kind, (p, q), bias, _, block, _), members in groups.items():
        suffix = "_bias" if bias else ""
        name = base = f"{kind}_{p}x{q}{suffix}"
        while name in buckets:  # the same shapes under another block
            name = f"{base}_{len(buckets)}"
        buckets[name] = Bucket(name, tuple(members), (p, q), block)
    return tuple(buckets.values())


def gather(
    bucket: Bucket,
    leaves: Mapping[str, jax.Array],
    dtype: jnp.dtype,
) -> jax.Array:
    """Canonical matrices of a bucket, `[copies, p, q]`: kernels, with the bias as last row of the
    input side.
    """
    _, q = bucket.shape
    # [copies, inputs, q] of every layer, one after another
    kernels, biases = [], []
    for layer in bucket.layers:
        kernel = _taken(layer, leaves[layer.kernel], layer.part).astype(dtype)
        kernels.append(_matrices(kernel, layer))
        if layer.bias is not None:
            bias = _taken(layer, leaves[layer.bias], layer.bias_part).astype(dtype)
            biases.append(bias.reshape(layer.copies, 1, q))
    matrices = jnp.concatenate(kernels)
    if not biases:
        return matrices
    last_rows = jnp.concatenate(biases)
    if len(matrices) > 1:
        return jnp.concatenate([matrices, last_rows], axis=1)
    # without the axis of copies: XLA would write it for products too, beside the one with it
    return jnp.concatenate([matrices[0], last_rows[0]])[None]


def _taken(layer: Layer, leaf: jax.Array, part: Part | None) -> jax.Array:
    """What a layer has of a leaf."""
    box = layer.box(part)
    return as_replicated(leaf)[box]


def _matrices(kernel: jax.Array, layer: Layer) -> jax.Array:
    n, layout = len(layer.stack), layer.layout
    # [*stack, *split] -> [*stack, *order] -> [copies, p, q]
    kernel = kernel.reshape(*layer.stack, *layout.split)
    order = [n + axis for axis in layout.order]
    kernel = kernel.transpose(*range(n), *order)
    return kernel.reshape(layer.copies, layer.inputs, layer.outputs)


def _as_stored(matrices: jax.Array, layer: Layer) -> jax.Array:
    n, layout = len(layer.stack), layer.layout
    # the same backwards: [copies, p, q] -> [*stack, *order] -> [*stack, *split] -> as stored
    ordered = [layout.split[axis] for axis in layout.order]
    kernel = matrices.reshape(*layer.stack, *ordered)
    back = [n + int(axis) for axis in np.argsort(layout.order)]
    kernel = kernel.transpose(*range(n), *back)
    return kernel.reshape(*layer.stack, *layout.shape)


def scatter(
    bucket: Bucket,
    matrices: jax.Array,
    leaves: Mapping[str, jax.Array],
    some: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Inverse of `gather`: leaves by name; what layers have no part of stays as it is in `leaves`.

    With `some`, a scalar bool known only when the step runs, a deep net compiles sooner; where it
    is false the leaves may be those of other layers of the bucket.
    """
    out: dict[str, jax.Array] = {}
    counts = [layer.copies for layer in bucket.layers]
    parts = consecutive(matrices, counts, some, many=_SEVERAL)
    # the copies of each layer; its bias is the last row of each
    for layer, mine in zip(bucket.layers, parts, strict=True):
        weights = mine[:, : layer.inputs]
        kernel = _as_stored(weights, layer)
        before = out.get(layer.kernel, leaves[layer.kernel])
        out[layer.kernel] = _put(layer, layer.part, kernel, before)
        if layer.bias is not None:
            before = out.get(layer.bias, leaves[layer.bias])
            out[layer.bias] = _put(layer, layer.bias_part, mine[:, layer.inputs], before)
    return out


def _put(
    layer: Layer,
    part: Part | None,
    value: jax.Array,
    leaf: jax.Array,
) -> jax.Array:
    """The leaf with the layer's part of it replaced, or the value as a leaf of that shape."""
    if part is None:
        return value.reshape(leaf.shape)
    box = layer.box(part)
    whole = as_replicated(leaf).astype(value.dtype)
    mine = value.reshape(*layer.stack, *part.sizes)
    return whole.at[box].set(mine)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays (or abstract arrays) in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def wide_dtype(tree: PyTree) -> Any:
    """The widest of float32 and the dtypes of a tree: for sums, statistics and the numbers in a
    state.
    """
    dtypes = [x.dtype for x in jax.tree.leaves(tree)]
    return jnp.result_type(jnp.float32, *dtypes)


def inner(left: PyTree, right: PyTree) -> jax.Array:
    """Sum of products of all entries of two trees, in their `wide_dtype`."""
    dtype = wide_dtype((left, right))
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    total = jnp.zeros((), dtype)
    for x, y in pairs:
        products = x.astype(dtype) * y.astype(dtype)
        total = total + jnp.sum(products)
    return total


def all_finite(tree: PyTree) -> jax.Array:
    """Scalar bool: every entry of every leaf is finite."""
    floats = [x for x in jax.tree.leaves(tree) if trains(x)]
    if not floats:
        return jnp.bool_(True)
    # half precision beside double
    zeros = [nothing_of(x).astype(jnp.float32) for x in floats]
    return jnp.isfinite(together(zeros)).all()


def trains(x: Any) -> bool:
    """Whether entries are of floating point, or complex: whole numbers and flags have no gradient,
    and are always finite.
    """
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def nothing_of(x: jax.Array) -> jax.Array:
    """Zero, shape=(), or NaN where an entry is not finite. Real also of complex numbers.

    A sum of `x - x`, which cannot overflow. Not the largest entry: on a CPU, XLA (0.10) loses NaN
    in the maximum of a large array. Nor `isfinite(x).all()`: that writes an array of flags and
    reads it.

    >>> print(nothing_of(jnp.array([3e38, 3e38])), nothing_of(jnp.array([1.0, jnp.inf])))
    0.0 nan
    """
    zeros = x - x
    if jnp.iscomplexobj(zeros):
        zeros = zeros.real + zeros.imag
    return jnp.sum(zeros)


def together(scalars: Sequence[jax.Array]) -> jax.Array:
    """Scalars on one axis, to be reduced once.

    Without the barrier XLA takes the reduction apart, and computes all of it again in each of the
    many loops that read the result: the program grows with the product of both numbers.
    """
    return jax.lax.optimization_barrier(jnp.stack(scalars))


def select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where `condition` (`[]` or `[n]`, matched to leading axes) holds, else `old`."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        # [n] -> [n, 1, ...]
        missing = (1,) * (a.ndim - condition.ndim)
        beside = condition.reshape(condition.shape + missing)
        return jnp.where(beside, a, b)

    return jax.tree.map(pick, new, old)


def present(
    layers: Iterable[Layer],
    leaves: Mapping[str, jax.Array],
) -> tuple[Layer, ...]:
    """The layers whose weight is among the leaves; a bias that is not (masked, say) leaves its
    layer.

    Under `optax.masked` and `optax.partition` a transformation sees only its own part of the
    parameters.
    """
    # a bias that is masked leaves a layer without one
    found = []
    for layer in layers:
        if layer.kernel not in leaves:
            continue
        if layer.bias is not None and layer.bias not in leaves:
            # proven of both together
            layer = dataclasses.replace(layer, bias=None, scale_free=False)
        found.append(layer)
    return tuple(found)


def covered_leaves(tree: PyTree, layers: Layers | None) -> dict[str, jax.Array]:
    """The leaves of the layers by name, zero in what none has of one; without `layers` all of them."""
    leaves = named_leaves(tree)
    if layers is None:
        return leaves
    mine = present(layers, leaves)
    names = set(itertools.chain.from_iterable(layer.leaves for layer in mine))
    covered = {name: x for name, x in leaves.items() if name in names}
    return emptied(covered, boxes_left(mine))


def grafted_leaves(tree: PyTree, layers: Layers) -> dict[str, jax.Array]:
    """The leaves without a block that get the size of the others (`uncovered="graft"`): those that
    the model uses.
    """
    if not layers.graft:
        return {}
    # what has a block, and what has no gradient
    unused = {u.path for u in layers.uncovered if u.reason in (NOT_USED, NOT_REAL)}
    left = covered_leaves(tree, layers).keys() | unused
    leaves = named_leaves(tree)
    return {name: x for name, x in leaves.items() if name not in left}
