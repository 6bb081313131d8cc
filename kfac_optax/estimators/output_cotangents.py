"""Output cotangents whose pullbacks have the curvature as second moment:
`E_k[seed_k seed_k^T] = H`.

Every estimator is a mean over `count` pullbacks, so block statistics, which are means too, need no
special case. Labels drawn from the model are independent between terms; columns get a random sign
for every term to the same effect.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._layout import zeros_of_type

Naturals = list[tuple[jax.Array, ...]]


class OutputCotangents(NamedTuple):
    """`make(k)` is the k-th of `count` cotangents, one tuple per head."""

    count: int
    make: Callable[[Any], Naturals]


def sampled_scores(
    heads: Sequence[Any],
    scales: Sequence[Any],
    key: jax.Array,
    samples: int,
) -> OutputCotangents:
    """Gradients of the negative log-likelihood at labels drawn from the model."""

    def make(k: Any) -> Naturals:
        # other labels in every draw and for every head
        own = jax.random.fold_in(key, k)
        keys = jax.random.split(own, len(heads))
        scores = []
        for head, scale, of_head in zip(heads, scales, keys, strict=True):
            score = _score(head, head.sample(of_head))
            scores.append(_scale(score, scale))
        return scores

    return OutputCotangents(samples, make)


def _score(head: Any, labels: Any) -> tuple[jax.Array, ...]:
    # terms are independent, so that one gradient of their sum has the score of each
    def total(natural: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.sum(head.with_natural(natural).nll(labels))

    return jax.grad(total)(head.natural)


def fisher_columns(heads: Sequence[Any], scales: Sequence[Any]) -> OutputCotangents:
    """All columns of the square root of the output Fisher, heads one after another.

    Scaled by the root of their number, since they are averaged where the GGN is their sum.
    """
    # column k of all heads together is column k - start of one of them
    counts = [head.num_columns for head in heads]
    total = sum(counts)

    def make(k: Any) -> Naturals:
        output_cotangents, start = [], 0
        for head, scale, count in zip(heads, scales, counts, strict=True):
            mine = (k >= start) & (k < start + count)
            position = jnp.clip(k - start, 0, count - 1)
            column = head.fisher_sqrt_column(position)
            # zeros for the other heads; sqrt(total) makes the mean over k the sum of columns
            own = tuple(_only_if(mine, math.sqrt(total) * c, c.dtype) for c in column)
            output_cotangents.append(_scale(own, scale))
            start += count
        return output_cotangents

    return OutputCotangents(total, make)


def _only_if(
    mine: jax.Array,
    x: jax.Array,
    dtype: Any,
) -> jax.Array:
    return jnp.where(mine, x, 0).astype(dtype)


def signed(
    output_cotangents: OutputCotangents,
    shapes: Sequence[tuple[int, ...]],
    key: jax.Array,
) -> OutputCotangents:
    """The same cotangents with an independent random sign for every term, so that terms do not mix.

    A column of all terms is pulled back at once, `sum_b s_b J_b^T c_b` with `E[s_b s_c] = 0` for
    `b != c`: in its second moment the products of different terms cancel in expectation, also where
    one parameter (or, in a model whose examples interact, one row) sees several terms. A row that
    sees one term is only multiplied by +-1, which changes no product.

    Args:
      output_cotangents: cotangents.
      shapes: of the terms of each head, its leading axes.
      key: PRNG key, another one for every statistic.

    Reference: Hutchinson (1990), on random signs; Bekas, Kokiopoulou & Saad (2007), on the
      diagonal.
    """

    def make(k: Any) -> Naturals:
        # other signs for every column
        own = jax.random.fold_in(key, k)
        keys = jax.random.split(own, len(shapes))
        triples = zip(output_cotangents.make(k), shapes, keys, strict=True)
        return [_signed_head(natural, shape, of_head) for natural, shape, of_head in triples]

    return OutputCotangents(output_cotangents.count, make)


def _signed_head(
    natural: tuple[jax.Array, ...],
    shape: tuple[int, ...],
    key: jax.Array,
) -> tuple[jax.Array, ...]:
    # [*terms] -> [*terms, 1, ...], beside the event axes
    signs = _signs(key, shape)

    def apply(x: jax.Array) -> jax.Array:
        beside = signs.reshape(*shape, *(1,) * (x.ndim - len(shape)))
        return x * beside.astype(x.dtype)

    return tuple(map(apply, natural))


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent signs. Those of an example are its own: padding behind it, or behind the batch,
    changes none.
    """
    if len(shape) < 2:
        return jax.random.rademacher(key, shape, jnp.float32)
    # a key for every example, whatever their number
    examples, *terms = shape

    def of_example(i: jax.Array) -> jax.Array:
        return _signs(jax.random.fold_in(key, i), tuple(terms))

    return jax.vmap(of_example)(jnp.arange(examples))


def _scale(cotangent: tuple[jax.Array, ...], scale: Any) -> tuple[jax.Array, ...]:
    """Multiplies by the root weight of each term; padding (weight 0) gives exact zeros, whatever is
    in it.
    """
    if scale is None:
        return cotangent

    def apply(x: jax.Array) -> jax.Array:
        # [*batch] -> [*batch, 1, ...]; a choice where it is zero: zero times NaN is NaN
        s = jnp.asarray(scale)
        s = s.reshape(s.shape + (1,) * (x.ndim - s.ndim))
        return jnp.where(s > 0, x * s, 0).astype(x.dtype)

    return tuple(map(apply, cotangent))


def mean_over(
    function: Callable[[Any], tuple[Any, Any]],
    count: int,
    chunk: int = 8,
) -> tuple[Any, Any]:
    """Of `function(k) -> (statistics, columns)` over `k < count`: the mean of the first, the second
    stacked on axis 0.

    `chunk` pullbacks at a time, so memory for statistics does not grow with the count.
    """
    # nothing to average, and no axis to batch over
    if count == 1:
        statistics, columns = function(jnp.int32(0))
        return statistics, jax.tree.map(lambda x: x[None], columns)
    # all at once
    if count <= chunk:
        statistics, columns = jax.vmap(function)(jnp.arange(count))
        means = jax.tree.map(lambda x: x.mean(0), statistics)
        return means, columns
    # the last chunk is filled up with repetitions that count nothing
    steps = -(-count // chunk)

    def add(total: Any, start: jax.Array) -> tuple[Any, Any]:
        ks = start + jnp.arange(chunk)
        values, columns = jax.vmap(function)(jnp.minimum(ks, count - 1))
        keep = ks < count

        def sum_of_kept(x: jax.Array) -> jax.Array:
            return jnp.tensordot(keep.astype(x.dtype), x, 1)

        part = jax.tree.map(sum_of_kept, values)
        return jax.tree.map(jnp.add, total, part), columns

    number = jax.ShapeDtypeStruct((), jnp.int32)
    shapes, _ = jax.eval_shape(function, number)
    zeros = jax.tree.map(zeros_of_type, shapes)
    starts = chunk * jnp.arange(steps)
    total, columns = jax.lax.scan(add, zeros, starts)

    def flat(x: jax.Array) -> jax.Array:
        # [steps, chunk, ...] -> [count, ...]
        return x.reshape(-1, *x.shape[2:])[:count]

    means = jax.tree.map(lambda x: x / count, total)
    return means, jax.tree.map(flat, columns)
