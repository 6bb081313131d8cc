"""How layers talk: couplings as tuples of functions, and what they are given to solve; no logic."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from kfac_optax._layer_types import PyTree

# canonical matrices of all layers with a block, one `[copies, p, q]` for every bucket
Vector = list[jax.Array]


class Directions(NamedTuple):
    """An update that has not been added up yet, for step rules that weigh its parts.

    Attributes:
      parts: trees like the gradient whose sum is the update; what no block covers is in the first,
        zero in the others.
    """

    parts: tuple[PyTree, ...]


class Sloped(NamedTuple):
    """An update with its products with the gradient, for step rules that bound it by them.

    Attributes:
      update: like the gradient.
      slopes: `[matrices]`, `<U_i, V_i> 2^-exponent` of every layer, with `V_i` its gradient.
      exponent: shape=(), dtype=int32.
    """

    update: PyTree
    slopes: jax.Array
    exponent: jax.Array


class Fine(NamedTuple):
    """The block-diagonal level at a refresh, for couplings that build on it. Rows are the matrices
    that couplings see.

    Attributes:
      factors: `row -> statistic` of its block.
      inverses: `row -> inverse` of its block.
      damping: of this refresh.
      sizes: `[L]`, number of parameters of each row.
    """

    factors: Callable[[int], PyTree]
    inverses: Callable[[int], PyTree]
    damping: jax.Array
    sizes: jax.Array


class System(NamedTuple):
    """What a coupling solves, `(F + damping I) x = gradient`, and the means to do it.

    Attributes:
      gradient: the right-hand side, a `Vector`.
      fine: `vector -> vector`, block-diagonal preconditioner.
      restrict: `vector -> [L]`, `Z`: the sum of all entries of every row.
      prolong: `[L] -> vector`, `Z^T`: the same number on all entries of a row, zeros in layers that
        couplings do not see.
      matrices: `vector -> [[p, q], ...]`, the rows one by one.
      replace: `(vector, matrices) -> vector`, the same with other rows.
      product: `vector -> F vector`, exact on this step's batch; an error where the step has no
        curvature.
      coarse: `(prolong, m) -> Z F Z^T` of the same batch, `[m, m]`, for any
        `prolong: [m] -> vector` that is `Z^T`.
      inverses: `row -> inverse` of its block.
      damping: of this step.
      sizes: `[L]`, number of parameters of each row.
    """

    # the right-hand side and both levels
    gradient: Vector
    fine: Callable[[Vector], Vector]
    restrict: Callable[[Vector], jax.Array]
    prolong: Callable[[jax.Array], Vector]
    matrices: Callable[[Vector], list[jax.Array]]
    replace: Callable[[Vector, Sequence[jax.Array]], Vector]
    # exact, on the batch of the step
    product: Callable[[Vector], Vector]
    coarse: Callable[[Callable[[jax.Array], Vector], int], jax.Array]
    inverses: Callable[[int], PyTree]
    damping: jax.Array
    sizes: jax.Array


class Coupling(NamedTuple):
    """How layers talk: a statistic across layers, and what becomes of the block-diagonal update.

    A *row* is one matrix of a layer with weights between units; rows are in order of execution.

    Attributes:
      name: word for the coverage table.
      init: `(layers, dtype) -> statistic`, for the layers that have rows.
      measure: `(a, g, weights) -> tree` for one use of one layer. What it sees has the rows of the
        layer in front.
      reduce: `(measured, examples) -> statistic`, from the values of all layers in order.
      factorize: `(statistic, Fine) -> inverse`.
      apply: `(inverse, System) -> [vector, ...]`, the parts whose sum is the update: the
        block-diagonal level first, then what the coupling adds to it.
      check: `(layers, blocks)`, raises where the coupling does not fit.
      sees: `"sums"`, the channel sums `alpha = sum(a)` and `gamma = sum(g)`,
        `[copies, N, *positions]` both; or `"rows"`, `a [copies, N, p]` with the bias coordinate and
        `g [copies, N, q]`, which demands one row per example.
      late: measure all uses of a layer at once, when every layer is known, instead of adding up
        what each gives.
    """

    name: str
    init: Callable[..., PyTree]
    measure: Callable[..., PyTree]
    reduce: Callable[..., PyTree]
    factorize: Callable[..., PyTree]
    apply: Callable[..., list[Vector]]
    check: Callable[..., None] = lambda layers, blocks: None
    # what it is given to measure
    sees: str = "sums"
    late: bool = False
