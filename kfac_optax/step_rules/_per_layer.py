"""What step rules need of layers: inner products, one scale for all of them, or a function of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._parts import boxes_left, copied, with_box, within_box
from kfac_optax._tree import (
    covered_leaves,
    gather,
    grafted_leaves,
    make_buckets,
    named_leaves,
    present,
    replace_leaves,
    scatter,
    together,
    wide_dtype,
)
from kfac_optax._types import Bucket, Layers, PyTree
from kfac_optax.linalg.powers import Scaled, exponent_or_zero, times_power
from kfac_optax.step_rules._alike import stacked_alike


def exponent_of(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """`e` with the largest entry in `[2^(e-1), 2^e)`; zero where nothing is, or that is not finite.
    Where there is a NaN it is any.

    >>> print(exponent_of({"a": jnp.array([1.0, -3.0])}))
    2
    """
    if not leaves:
        return jnp.zeros((), jnp.int32)
    return exponent_or_zero(largest_of(leaves)).astype(jnp.int32)


def largest_of(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """The largest size of an entry, float32 or wider; what it is where one is NaN nobody knows.

    >>> print(largest_of({"a": jnp.array([1.0, -3.0])}))
    3.0
    """
    wide = _wide(leaves)
    of_leaves = [jnp.max(jnp.abs(x), initial=0) for x in leaves.values()]
    return jnp.max(together([x.astype(wide) for x in of_leaves]))


def exact_square(
    curvature: Any,
    leaves: Mapping[str, jax.Array],
    *,
    subsample: Any,
    axis_name: Any,
) -> tuple[jax.Array, jax.Array]:
    """`d^T F d` of a direction by name, with zeros for what it leaves out, and the exponent of a
    power of two that multiplies it.
    """
    exponent = exponent_of(leaves)
    # products with a direction of ordinary length cannot overflow
    shorter = {}
    for name, x in leaves.items():
        wide = x.astype(wide_dtype(x))
        shorter[name] = times_power(wide, -exponent).astype(x.dtype)
    direction = like_parameters(curvature.params, shorter)
    form = curvature.quadratic_form((direction,), subsample=subsample, axis_name=axis_name)
    return form[0, 0], 2 * exponent


def inner_products(
    left: PyTree,
    right: PyTree,
    layers: Layers | None,
) -> Scaled:
    """`<left_i, right_i>` of every layer, `[k]`; without `layers` every leaf is one.

    Leaves of one type are neighbours, in order of first appearance. The entries of both sides are
    divided by a power of two first, so that no product overflows. Of complex leaves it is the real
    part of the product with the conjugate.

    >>> products = inner_products({"a": jnp.ones(2), "b": jnp.ones(1)}, {"a": jnp.ones(2), "b": -jnp.ones(1)}, None)
    >>> print(products.values * 2.0**products.exponent)
    [ 2. -1.]
    """
    # parameters without a block have no part in the product
    u = covered_leaves(left, layers)
    v = covered_leaves(right, layers)
    dtype = jnp.promote_types(_wide(u), _wide(v))
    # stacked first: XLA takes minutes to compile a number that depends on all leaves of a deep net
    # and scales each
    if layers is None:
        u, v = stacked_alike(u, v)
    else:
        buckets = make_buckets(present(layers, v))
        u = {bucket.name: gather(bucket, u, dtype) for bucket in buckets}
        v = {bucket.name: gather(bucket, v, dtype) for bucket in buckets}
    # entries of both sides at most one; the exponents go along apart from the products
    of_u = exponent_of(u)
    of_v = exponent_of(v)
    u = {name: times_power(_widened(x, dtype), -of_u) for name, x in u.items()}
    v = {name: times_power(_widened(x, dtype), -of_v) for name, x in v.items()}
    # one number for every leaf, or for every matrix [copies, p, q]
    if layers is None:
        products = [jnp.real(u[name] * jnp.conj(v[name])) for name in v]
        parts = [jnp.sum(x, tuple(range(1, x.ndim))).astype(dtype) for x in products]
    else:
        parts = [jnp.sum(u[name] * v[name], axis=(1, 2)) for name in v]
    values = jnp.concatenate(parts) if parts else jnp.zeros((1,), dtype)
    return Scaled(values, of_u + of_v)


def inverse_root_of(
    values: jax.Array,
    exponent: jax.Array,
    rate: Any,
    bound: Any,
) -> jax.Array:
    """`min(1, sqrt(bound / (rate^2 values 2^exponent)))`; one where the divisor is not a positive
    finite number.

    >>> print(inverse_root_of(jnp.float32(25.0), jnp.int32(0), 1.0, 1.0))
    0.2
    """
    # sqrt(bound / (rate^2 v 2^(e - 2h))) 2^-h: the power leaves the root
    half = exponent >> 1
    rest = times_power(values, exponent - 2 * half)
    rate = jnp.asarray(rate, values.dtype)
    square = jnp.square(rate) * rest
    usable = jnp.isfinite(square) & (square > 0)
    divisor = jnp.where(usable, square, 1)
    bound = jnp.asarray(bound, values.dtype)
    scale = jnp.sqrt(bound / divisor)
    shortened = jnp.minimum(times_power(scale, -half), 1)
    return jnp.where(usable, shortened, 1)


def norms(x: jax.Array, *, mean: bool = False) -> jax.Array:
    """Frobenius norms of matrices `[copies, p, q]`, or root mean squares, without overflow of the
    squares.

    >>> print(norms(jnp.full((1, 2, 2), 1e30)))
    [2.e+30]
    """
    # a power of two near the largest entry of each matrix, [copies, 1, 1]
    sizes = jnp.abs(x)
    largest = jnp.max(sizes, axis=(1, 2), keepdims=True, initial=0)
    exponent = exponent_or_zero(largest)
    squares = jnp.square(times_power(sizes, -exponent))
    reduce = jnp.mean if mean else jnp.sum
    root = jnp.sqrt(reduce(squares, axis=(1, 2)))
    return times_power(root, exponent[:, 0, 0])


def root_mean_square(leaves: Mapping[str, jax.Array], left_out: int = 0) -> jax.Array:
    """Root of the mean square over the entries of all leaves together, without overflow of the
    squares; `left_out` entries are zero and do not count.

    >>> print(root_mean_square({"a": jnp.full(3, 3e30), "b": jnp.full(1, 3e30)}).round(-28))
    3e+30
    """
    # by the largest entry of all leaves together
    largest = largest_or_one(leaves)
    scaled = [jnp.abs(x).astype(largest.dtype) / largest for x in leaves.values()]
    total = jnp.asarray(sum(jnp.sum(jnp.square(x)) for x in scaled), largest.dtype)
    entries = sum(x.size for x in scaled) - left_out
    return jnp.sqrt(total / max(entries, 1)) * largest


def largest_or_one(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """The largest size of an entry, or one where it is zero or not finite: what entries may be
    divided by before they are squared.
    """
    largest = largest_of(leaves)
    usable = jnp.isfinite(largest) & (largest > 0)
    return jnp.where(usable, largest, 1)


def scale_layers(
    tree: PyTree,
    scale: jax.Array,
    layers: Layers | None,
) -> PyTree:
    """`tree` with what the layers have multiplied by one number, and what has been given their
    size.
    """
    mine = covered_leaves(tree, layers)
    scaled = {name: x * scale.astype(x.dtype) for name, x in mine.items()}
    if layers is None:
        return replace_leaves(tree, scaled)
    left = grafted_leaves(tree, layers)
    scaled |= {name: x * scale.astype(x.dtype) for name, x in left.items()}
    # what no layer has of a leaf that some share out goes with the leaves that none has
    leaves = named_leaves(tree)
    for name, boxes in boxes_left(present(layers, leaves)).items():
        rest = leaves[name]
        if layers.graft:
            rest = rest * scale.astype(rest.dtype)
        scaled[name] = copied(scaled[name], boxes, rest)
    return replace_leaves(tree, scaled)


def map_layers(
    function: Callable[..., tuple[jax.Array, Any]],
    *trees: PyTree,
    layers: Layers | None,
) -> tuple:
    """Applies a function to the matrices of every layer, kernel and bias together.

    Args:
      function: gets `[copies, p, q]` of every tree, for layers of one shape at once, and returns
        the new matrices and something to report of each copy, `[copies]`.
      *trees: updates with the same leaves.
      layers: kernel and bias of each make a layer, and so does every other leaf on its own.

    Returns:
      A tree like the first, and the reports, `[number of matrices]`.
    """
    # kernel and bias of equal layers as one array of matrices
    leaves = [named_leaves(tree) for tree in trees]
    dtype = _wide(leaves[0])
    new: dict[str, jax.Array] = {}
    reports = [jnp.zeros((0,), dtype)]
    buckets: Sequence[Bucket] = ()
    mine = () if layers is None else present(layers, leaves[0])
    if mine:
        buckets = make_buckets(mine)
    for bucket in buckets:
        gathered = [gather(bucket, x, dtype) for x in leaves]
        matrices, report = function(*gathered)
        new |= scatter(bucket, matrices, leaves[0] | new)
        reports.append(report)
    # what belongs to no layer is a matrix of one row: boxes of leaves that layers share out, and
    # all other leaves
    for name, boxes in boxes_left(mine).items():
        for box in boxes:
            rows = [_one_row(within_box(x[name], box), dtype) for x in leaves]
            matrix, report = function(*rows)
            new[name] = with_box(new[name], box, matrix.reshape(box.sizes))
            reports.append(report)
    for name in [n for n in leaves[0] if n not in new]:
        rows = [_one_row(x[name], dtype) for x in leaves]
        matrix, report = function(*rows)
        new[name] = matrix.reshape(leaves[0][name].shape)
        reports.append(report)
    new = {name: within(x, leaves[0][name].dtype) for name, x in new.items()}
    return replace_leaves(trees[0], new), jnp.concatenate(reports)


def within(x: jax.Array, dtype: Any) -> jax.Array:
    """Finite entries within the range of a narrower dtype: at its end instead of infinite.

    >>> print(float(within(jnp.float32(-1e6), jnp.float16)))
    -65504.0
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        return x
    # NaN and infinity stay, to be seen
    end = jnp.finfo(dtype).max.astype(x.dtype)
    clipped = jnp.clip(x, -end, end)
    return jnp.where(jnp.isfinite(x), clipped, x).astype(dtype)


def like_parameters(params: PyTree, leaves: Mapping[str, jax.Array]) -> PyTree:
    """A tree like the parameters with these leaves, zero elsewhere: what is masked has no part in a
    direction.
    """
    return replace_leaves(jax.tree.map(jnp.zeros_like, params), leaves)


def require_curvature(where: str, why: str, curvature: Any) -> Any:
    """The extra argument `curvature`, or an error that shows the line to write."""
    if curvature is None:
        raise ValueError(
            f"{where}.update got no `curvature`, which {why} needs in every step. Pass the lazy "
            "curvature of this batch,\n\n"
            '    tx.update(grads, opt_state, params, curvature=fisher.at(params, batch["x"], key=key))\n\n'
            "To take no statistics in a step, give the preconditioner inside a period instead "
            "(`curvature_every`)."
        )
    return curvature


def _wide(leaves: Mapping[str, jax.Array]) -> Any:
    """A real dtype: of complex leaves that of their parts."""
    real = [jnp.finfo(x.dtype).dtype for x in leaves.values()]
    return jnp.result_type(jnp.float32, *real)


def _widened(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(jnp.promote_types(dtype, x.dtype))


def _one_row(x: jax.Array, dtype: Any) -> jax.Array:
    """Any array as a matrix of one row, `[1, 1, n]`."""
    return _widened(x, dtype).reshape(1, 1, -1)
