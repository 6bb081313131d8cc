"""A block with data to run it on, its statistic, and its functions as dense matrices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._types import Block, Layer, Layout, PyTree, Use

Rows = list[tuple[jax.Array, jax.Array]]  # inputs and output gradients of every use of a layer


class Case(NamedTuple):
    """A block, and data to run it on.

    Attributes:
      block: to be checked.
      layer: whose block it is, from `dense_layer`.
      rows: `(seed, examples) -> [(a, g), ...]`, random inputs `[examples, *positions, inputs]` and
        output gradients `[examples, *positions, q]`, one pair for every use.
      exact: the damping is added to the block as it is, so that `solve` inverts
        `multiply + damping I`.
      averaged: the statistic is the whole average, which can be multiplied with.
      outputs: output gradients have a part in it; without, the scale of the loss has no influence.
      scales: with a damping that follows the scale of the loss, solves do; not where it is shared
        out between factors whatever their sizes.
      damped: the damping has a part in it.
    """

    block: Block
    layer: Layer
    rows: Callable[[int, int], Rows]
    exact: bool = False
    averaged: bool = True
    outputs: bool = True
    scales: bool = True
    damped: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """`[p, q]` of the layer's matrix, `p` with the bias row."""
        return self.layer.shape


def dense_layer(
    inputs: int,
    outputs: int,
    *,
    bias: bool = False,
    kind: str = "dense",
    channels: int = 0,
) -> Layer:
    """A layer that belongs to no model, to call the functions of a block with.

    Args:
      inputs: without the bias row, or the size of a vocabulary.
      outputs: q.
      bias: whether it has one.
      kind: as in `Layer`.
      channels: of a convolution's input.

    >>> print(dense_layer(3, 2, bias=True).shape)
    (4, 2)
    """
    shape = inputs, outputs
    layout = Layout(shape, shape, (0, 1))
    name = "bias" if bias else None
    return Layer("", kind, "kernel", name, inputs, outputs, layout, channels=channels)


def dense_case(
    block: Block,
    p: int = 4,
    q: int = 3,
    *,
    bias: bool = False,
    **fields: Any,
) -> Case:
    """A block on a dense layer with random rows, see `Case` for further fields.

    >>> import kfac_optax as ko
    >>> ko.testing.check_block(dense_case(ko.kronecker(), exact=True))
    """
    # the bias is a row of the matrix that no input has
    width = p - bias

    def rows(seed: int, examples: int) -> Rows:
        random = np.random.default_rng(seed)
        # a [N, p], g [N, q]
        a = random.standard_normal((examples, width))
        g = random.standard_normal((examples, q))
        return [(jnp.asarray(a), jnp.asarray(g))]

    return Case(block, dense_layer(width, q, bias=bias), rows, **fields)


def compiled(case: Case) -> Case:
    """The case with functions that are compiled once, not operation by operation in every check."""
    block = case.block
    block = block._replace(
        factorize=jax.jit(block.factorize),
        solve=jax.jit(block.solve),
        multiply=jax.jit(block.multiply),
    )
    return case._replace(block=block)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def measure(
    case: Case,
    rows: Rows,
    examples: int,
    dtype: Any = jnp.float64,
    weights: Any = None,
) -> PyTree:
    """The statistic of a case's block, added up over uses; `weights [examples]`."""
    # rows of all uses, positions counted
    count = sum(g[..., 0].size for _, g in rows)
    use = Use(case.layer, examples, count, dtype)
    known = _read(case, dtype)
    parts = []
    for a, g in rows:
        weighted = use
        if weights is not None:
            weighted = use._replace(weights=_spread(weights, a))
        part = case.block.measure(a, g, weighted, *known)
        # what a block absorbs comes beside its statistic
        if case.block.absorb is not None:
            part, _ = part
        parts.append(part)
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts)


def _read(case: Case, dtype: Any) -> tuple[PyTree, ...]:
    """What the block measures in: the basis that stands for nothing measured yet."""
    if not case.block.reads_inverse:
        return ()
    start = case.block.init(case.layer, dtype)
    one = jnp.ones((), dtype)
    return (case.block.factorize(start, one),)


def _spread(weights: jax.Array, a: jax.Array) -> jax.Array:
    """A weight for each example, the same at all of its positions."""
    # tokens have no axis of features
    tokens = jnp.issubdtype(a.dtype, jnp.integer)
    rows = a.shape if tokens else a.shape[:-1]
    positions = (1,) * (len(rows) - 1)
    beside = weights.reshape(-1, *positions)
    return jnp.broadcast_to(beside, rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _columns(
    apply: Any,
    shape: tuple[int, int],
    operands: PyTree,
    *rest: Any,
) -> jax.Array:
    # unit matrices E_ij [p, q], whose images are the columns
    p, q = shape
    units = jnp.eye(p * q).reshape(-1, p, q)
    images = jax.vmap(lambda v: apply(operands, v, *rest))(units)
    # [pq, p, q] to columns
    return images.reshape(len(units), -1).T


def matrix(
    apply: Any,
    shape: tuple[int, int],
    *operands: Any,
) -> np.ndarray:
    """`apply(operands[0], V, *operands[1:])`, `V` of a shape, as a dense matrix."""
    return np.asarray(_columns(apply, shape, *operands))
