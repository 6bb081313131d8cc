"""The matrix behind a curvature, `F = (1/N) J^T J`, as products in both directions, from one
linearisation.

`J` has a row for every term of the batch and every column of the root `S` of its output Fisher
`H = S S^T`: row `(b, c)` is `s_bc^T (d natural_b / d theta)`, times the root of the term's weight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._tree import wide_dtype
from kfac_optax._types import PyTree
from kfac_optax.estimators.centring import about_mean, centred_cotangents, is_centred
from kfac_optax.estimators.heads import Kind, count_examples, find_weights, split_outputs
from kfac_optax.estimators.output_cotangents import Naturals, sampled_scores
from kfac_optax.estimators.products import read_terms
from kfac_optax.estimators.reductions import devices_of, sum_over_devices
from kfac_optax.estimators.tangents import linearized
from kfac_optax.linalg.weighted_rows import keep_rows

_CHUNK = 32  # columns that exist at the same time

Samples = list[jax.Array]  # one number for every row of J: `[*batch, columns]` of every head


class SampleJacobian(NamedTuple):
    """`J` of a batch, with `F = (1/examples) J^T J`.

    A vector in sample space is a list with one array for every head of the prediction:
    `[*batch, columns]`, or `[N]` where the function returns losses.

    Attributes:
      jvp: `v -> J v` for a tree like the parameters; of a batch split over devices the rows that
        this device has.
      vjp: `u -> J^T u`, a tree like the parameters; summed over the devices.
      examples: N, those of all devices.
    """

    jvp: Callable[[PyTree], Samples]
    vjp: Callable[[Samples], PyTree]
    examples: int


class Columns(NamedTuple):
    """The columns of one head, by which tangents of its natural arrays become rows."""

    count: int
    column: Callable[[Any], tuple[jax.Array, ...]]
    batch_ndim: int
    root: Any  # of the weight of every term, or None

    def weighted(
        self,
        x: jax.Array,
        chosen: jax.Array,
    ) -> jax.Array:
        """One array of a column with the weights of its terms, zero where they are not chosen."""
        beside = (*chosen.shape, *(1,) * (x.ndim - chosen.ndim))
        # all terms count the same
        if self.root is None:
            return jnp.where(chosen.reshape(beside), x, 0)
        root = jnp.asarray(self.root, wide_dtype(x))
        root = jnp.broadcast_to(root, chosen.shape)
        counts = (chosen & (root != 0)).reshape(beside)
        weighted = x * root.reshape(beside)
        return jnp.where(counts, weighted, 0).astype(x.dtype)


def sample_jacobian(
    kind: Kind,
    function: Callable,
    params: PyTree,
    args: Sequence[PyTree],
    *,
    key: jax.Array | None = None,
    samples: int = 1,
    axis_name: Any = None,
) -> SampleJacobian:
    """`J` at these parameters.

    Args:
      kind: of estimator.
      function: parameters and arguments to predictions, or to losses.
      params: where it is linearised.
      args: further arguments.
      key: draws labels from the model: the rows are then `samples` scores of every term in place of
        all columns, and `(1/N) J^T J` has the Fisher as its mean.
      samples: draws for every term.
      axis_name: mapped axis over which the batch is split.
    """

    def naturals(params: PyTree) -> tuple[Any, Any]:
        return split_outputs(kind, function(params, *args))

    # J v = S^T (d natural) v for every term
    tangents_of, heads = linearized(naturals, params)
    examples = count_examples(kind, heads) * devices_of(axis_name)
    if kind.losses:

        def rows_of(direction: PyTree) -> Samples:
            tangents = [tangent for (tangent,) in tangents_of(direction)]
            return [tangent.astype(wide_dtype(tangent)) for tangent in tangents]
    else:
        # a row of J carries the root of its term's weight
        roots = find_weights(kind, heads, axis_name).roots
        columns = columns_of(heads, roots, key, samples)

        def rows_of(direction: PyTree) -> Samples:
            rows = []
            for head, column, tangent in zip(heads, columns, tangents_of(direction), strict=True):
                centred = _centred(head, column.root, tangent, axis_name)
                rows.append(_rows(column, centred))
            return rows

    return SampleJacobian(rows_of, _transposed(rows_of, params, axis_name), examples)


def columns_of(
    heads: Sequence[Any],
    roots: Sequence[Any],
    key: jax.Array | None,
    samples: int,
) -> list[Columns]:
    """All columns of `S`; with a key scores at drawn labels, divided by the root of their number."""
    # with a key the scores at drawn labels stand for the columns of S
    counts = [head.num_columns if key is None else samples for head in heads]
    makers = [head.fisher_sqrt_column for head in heads]
    if key is not None:
        shares = [samples**-0.5] * len(heads)
        scores = sampled_scores(heads, shares, key, samples)
        makers = [functools.partial(_part_of, scores.make, i) for i in range(len(heads))]
    ndims = [len(head.batch_shape) for head in heads]
    each = zip(counts, makers, ndims, roots, strict=True)
    return [Columns(*parts) for parts in each]


def _part_of(
    make: Callable[[Any], Naturals],
    i: int,
    k: Any,
) -> tuple[jax.Array, ...]:
    return make(k)[i]


def _centred(
    head: Any,
    root: Any,
    tangents: tuple[jax.Array, ...],
    axis_name: Any,
) -> Any:
    """Tangents about their mean, where the scores of the head are taken so."""
    if not is_centred(head):
        return tangents
    return about_mean(read_terms(tangents, root), root, axis_name)


def _rows(head: Columns, tangents: tuple[jax.Array, ...]) -> jax.Array:
    """`S^T t` of every term, `[*batch, columns]`; exact zeros where the weight is zero."""
    wide = wide_dtype(tangents)

    def against(c: jax.Array) -> jax.Array:
        column = read_terms(head.column(c), head.root)
        terms = []
        for s, t in zip(column, tangents, strict=True):
            product = s.astype(wide) * t.astype(wide)
            event = tuple(range(head.batch_ndim, product.ndim))
            terms.append(product.sum(event))
        return sum(terms[1:], terms[0])

    # [columns, *batch] -> [*batch, columns]
    numbers = jnp.arange(head.count)
    of_all = jax.vmap(against)
    if head.count > _CHUNK:
        of_all = functools.partial(jax.lax.map, against, batch_size=_CHUNK)
    rows = jnp.moveaxis(of_all(numbers), 0, -1)
    if head.root is None:
        return rows
    root = jnp.asarray(head.root, wide)
    root = jnp.broadcast_to(root, rows.shape[:-1])
    # padding may hold anything, in its tangents and in its columns
    return keep_rows(rows, root) * root[..., None]


def _transposed(
    rows_of: Callable[[PyTree], Samples], params: PyTree, axis_name: Any
) -> Callable[[Samples], PyTree]:
    # linear in the direction, so that its transpose is J^T, without a second pass forward
    shapes = jax.eval_shape(rows_of, params)
    backward = jax.linear_transpose(rows_of, params)

    def vjp(rows: Samples) -> PyTree:
        rows = jax.tree.map(_like, rows, shapes)
        (product,) = backward(rows)
        return sum_over_devices(product, axis_name, shapes)

    return vjp


def _like(u: jax.Array, shape: Any) -> jax.Array:
    """A vector in sample space with the dtype, and on explicit axes the sharding, of the rows."""
    sharding = getattr(shape, "sharding", None)
    spec = getattr(sharding, "spec", ())
    if any(part is not None for part in spec):
        u = jax.sharding.reshard(u, sharding)
    return u.astype(shape.dtype)


def sampled_gradient(
    kind: Kind,
    function: Callable,
    params: PyTree,
    args: Sequence[PyTree],
    key: jax.Array,
    *,
    samples: int = 1,
    axis_name: Any = None,
) -> PyTree:
    """Gradient of the batch's mean negative log-likelihood at labels drawn from the model.

    `(1/N) sum_b w_b mean_k grad nll(y_bk)`, one backward pass for all draws. Its mean over draws is
    zero, and `N` times its second moment is the Fisher where all examples count the same.
    """

    def naturals(params: PyTree) -> tuple[Any, Any]:
        return split_outputs(kind, function(params, *args))

    # scores of all draws averaged at the outputs, then one pullback
    values, pull, heads = jax.vjp(naturals, params, has_aux=True)
    roots = find_weights(kind, heads, axis_name).roots
    weights = [None if root is None else jnp.square(root) for root in roots]
    scores = sampled_scores(heads, weights, key, samples)
    scores = centred_cotangents(scores, heads, roots, axis_name)
    of_draws = jax.vmap(scores.make)(jnp.arange(samples))
    cotangents = jax.tree.map(lambda x: x.mean(0), of_draws)
    (gradient,) = pull(cotangents)
    gradient = sum_over_devices(gradient, axis_name, values)
    examples = count_examples(kind, heads) * devices_of(axis_name)
    return jax.tree.map(lambda x: x / examples, gradient)
