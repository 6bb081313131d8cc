"""Which low-rank block each layer gets from a method of the family: sketched, or followed online."""

import functools
from collections.abc import Callable
from typing import Any

from kfac_optax._types import Block, Layer
from kfac_optax._validate import check_choice, check_number
from kfac_optax.blocks.low_rank.low_rank import low_rank
from kfac_optax.engine.choice import BlockOf, blocks_of

Rank = int | Callable[[Layer], int]
# What the methods do with factors that are followed online: overwrite them with a sketch, correct
# some of their directions.
_ONLINE = {
    "b_kfac": (False, False),
    "b_r_kfac": (True, False),
    "b_kfac_c": (False, True),
    "b_r_c": (True, True),
}
METHODS = ("rs_kfac", *_ONLINE)


def low_rank_blocks(
    method: str = "b_kfac",
    *,
    rank: Rank = 128,
    correct_every: int = 5,
    inverse: str = "auto",
    normalization: str = "unitwise",
    convolution: str = "kfc",
    recurrence: str = "independent",
    precision: Any = "highest",
    **options: Any,
) -> BlockOf:
    """The block that every layer gets from a method with low-rank factors: a function for `block=`,
    or for `coverage`.

    A factor of dimension `d` is followed online where the method does that, the layer is dense,
    positions are not pooled (`sharing="reduce"`), and `rank + rows < d`, with the rows of the
    traced batch (positions count); otherwise its dense average is kept and sketched at every
    refresh. A factor with `d <= rank` is decomposed as a whole (`clamped` in the table where the
    rank is larger).

    Args:
      method: `"rs_kfac"`, `"b_kfac"`, `"b_r_kfac"`, `"b_kfac_c"` or `"b_r_c"`.
      rank: eigenpairs of each factor; or a function of the layer.
      correct_every: statistics between corrections, of methods that correct.
      inverse: of embeddings.
      normalization: as for `kfac`.
      convolution: as for `kfac`.
      recurrence: as for `kfac`.
      precision: matmul precision.
      **options: further arguments of `low_rank`.

    Raises:
      ValueError: unknown method, `rank < 1`, an argument of `low_rank` out of range.

    >>> import jax.numpy as jnp, kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> layers = estimator.layers(jnp.zeros((100, 3)), jnp.ones((5, 100)))
    >>> print(ko.coverage(layers, block=low_rank_blocks(rank=8)))
    layer   kind   kernel  bias  uses  block                                        state bytes
    ------  -----  ------  ----  ----  -------------------------------------------  -----------
    (root)  dense  100x3   no    1     low rank (8 of 100 online x all 3, clamped)  3,748
    total                                                                           3,748
    """
    where = "low_rank_blocks"
    check_choice(where, "method", method, METHODS)
    if not callable(rank):
        check_number(where, "rank", rank, at_least=1)
    # "rs_kfac" sketches dense averages: nothing is followed
    overwrite, corrected = _ONLINE.get(method, (False, False))
    options |= {
        "overwrite": overwrite,
        "correct_every": correct_every if corrected else None,
        "precision": precision,
    }

    # one block for all layers of equal rank and shape: they share a batched call
    @functools.cache
    def made(
        rank: int,
        shape: tuple[int, int],
        online: tuple[bool, bool],
    ) -> Block:
        block = low_rank(rank, online=online, **options)
        return block._replace(
            name=f"low rank ({' x '.join(map(functools.partial(_describe, rank), shape, online))})"
        )

    linear = made(1 if callable(rank) else rank, (1, 1), (False, False))  # checks what it is given
    others = blocks_of(
        linear,
        inverse=inverse,
        normalization=normalization,
        convolution=convolution,
        recurrence=recurrence,
        precision=precision,
    )
    # followed online, every position is a row of its own
    rows_apart = method in _ONLINE and options.get("sharing", "expand") == "expand"

    def block_of(layer: Layer) -> Block:
        other = others(layer)
        if other is not linear:
            return other
        # a rank of its own for every layer
        mine = rank(layer) if callable(rank) else rank
        follows = rows_apart and layer.kind in ("dense", "einsum")
        # online where the rank and the rows of a batch are fewer than the dimension
        p, q = (follows and mine + layer.rows < d for d in layer.shape)
        return made(mine, layer.shape, (p, q))

    return block_of


def _describe(rank: int, dimension: int, online: bool) -> str:
    # words of the coverage table
    if rank >= dimension:
        return f"all {dimension}, clamped" if rank > dimension else f"all {dimension}"
    return f"{rank} of {dimension} {'online' if online else 'sketched'}"
