"""Per-layer curvature approximations as tuples of functions, and the buckets they serve; no logic."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kfac_optax._layer_types import Layer, PyTree


class Block(NamedTuple):
    """A per-layer curvature approximation as five pure functions (one layer each; buckets are
    mapped over).

    Attributes:
      name: word for the coverage table.
      init: `(layer, dtype) -> statistic`, the value that stands for "nothing measured yet".
      measure: `(a, g, use) -> statistic`, contribution of one use; `g` is `None` where only inputs
        are measured.
      factorize: `(statistic, damping) -> inverse`.
      solve: `(inverse, V, damping) -> V preconditioned`, `V` of shape `[p, q]`.
      multiply: `(statistic, V) -> F V`, undamped.
      rows: `measure` sees all uses of the layer at once, `a [N, T, p]` and `g [N, T, q]` with steps
        in time or positions on axis 1, instead of being added up over uses.
      sharing: what becomes of positions that share a weight: `"expand"` makes each a row,
        `"reduce"` averages the inputs and adds up the output gradients of an example first.
      positions: at most about this many positions of an example are measured, evenly spaced; `None`
        for all.
      raw: `measure` sees the input map of a convolution itself, not its patches.
      refresh: `(inverse, statistic, damping, count) -> inverse`, in place of `factorize` later on;
        `count` numbers the statistics, for random draws.
      absorb: `(inverse, news, statistic, damping, average) -> inverse`, what becomes of the inverse
        at every statistic. Such a block measures `(statistic, news)`. `average` is an `Average`.
      solve_rows: `(inverse, a, g, damping) -> (U, (b, h))`, `a^T g` preconditioned as `U = b^T h`,
        from rows `a [R, p]` and `g [R, q]`, with rows `b` and `h` of the same shapes; or `None`
        where that would cost more than `solve`.
      first_moments: `measure` averages `g` itself, not its products: it needs the output gradients
        of the data's own loss, without random signs and with the whole weight of their example
        (others carry its root).
      absorbs: what the news are. `"columns"`: rows of the batch, which come with an axis of
        pullbacks in front, and those of all devices together. `"means"`: means over examples, as
        statistics are, over pullbacks and devices too.
      reads_inverse: `measure` is `(a, g, use, inverse) -> statistic`: it measures in what the last
        refresh has made, an eigenbasis for example.
      per_example: `measure` needs the whole gradient of an example, so it sees all uses of a layer
        that has several at once, as with `rows`; axis 0 of what it sees has to be the examples.
      due: `(inverse, statistic, damping, count) -> (due, inverse)`, a layer's own say about its
        refresh, asked at every one of the schedule: whether it is worth its work, and the inverse
        to keep if not (the same but for what the rule remembers). Where no layer of a bucket is
        due, nothing is factorised.
      root_solve: `(inverse, Z, damping) -> R Z`, `Z` of shape `[p, q]`, where `R R^T` is what
        `solve` applies: it turns white noise into a sample of covariance `(F + damping I)^{-1}`.
      logdet: `(inverse, damping, (p, q)) -> log det(F + damping I)`, of the matrix that `solve`
        inverts; directions that `solve` leaves out as singular are not counted.
      per_unit: `measure` reads squares of `g` alone: every output unit has a metric of its own.
      masks: it solves on the entries that the layer's mask leaves.
    """

    # what every block has
    name: str
    init: Callable[..., PyTree]
    measure: Callable[..., PyTree]
    factorize: Callable[..., PyTree]
    solve: Callable[..., jax.Array]
    multiply: Callable[..., jax.Array]
    # what it is given to measure
    rows: bool = False
    sharing: str = "expand"
    positions: int | None = None
    raw: bool = False
    # rules of its own for what it holds
    refresh: Callable[..., PyTree] | None = None
    absorb: Callable[..., PyTree] | None = None
    # shortcuts and demands that only some blocks have
    solve_rows: Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]] | None] | None = None
    first_moments: bool = False
    absorbs: str = "columns"
    reads_inverse: bool = False
    per_example: bool = False
    # its own say about refreshes, and what posteriors need of it
    due: Callable[..., tuple[jax.Array, PyTree]] | None = None
    root_solve: Callable[..., jax.Array] | None = None
    logdet: Callable[..., jax.Array] | None = None
    # who can measure it
    per_unit: bool = False
    masks: bool = False


class Travel(NamedTuple):
    """How statistics travel between devices: symmetric matrices `packed`, without their double
    entries, and in another `dtype`; `None` is their own. Kronecker factors in as many `bits` for a
    number; `None` is all of them.
    """

    packed: bool = False
    dtype: Any = None
    bits: int | None = None


class Near(NamedTuple):
    """Kronecker factors of a layer that all devices have, `[copies, n, n]`, and how far those may
    be off that are sent near them, a pair of `[copies]`, in Frobenius norm; and the norms up to which
    these errors are small enough, negative where none is.
    """

    factors: tuple[jax.Array, jax.Array]
    errors: tuple[jax.Array, jax.Array]
    largest: tuple[jax.Array, jax.Array]


class Average(NamedTuple):
    """How a new statistic is averaged in: `S <- weight S + (1 - weight) S_new`, as number `count`
    of those accepted. `decay` is the bound of the weight, `weight = min(1 - 1/count, decay)`.
    """

    weight: jax.Array
    count: jax.Array
    decay: jax.Array


class Bucket(NamedTuple):
    """Layers of one kind and shape that share a block, stacked on a leading axis of length
    `copies`.
    """

    name: str
    layers: tuple[Layer, ...]
    shape: tuple[int, int]
    block: Block | None = None

    @property
    def copies(self) -> int:
        return sum(layer.copies for layer in self.layers)

    @property
    def slices(self) -> list[tuple[Layer, slice]]:
        """Each layer with its copies on the leading axis."""
        found, start = [], 0
        for layer in self.layers:
            found.append((layer, slice(start, start + layer.copies)))
            start += layer.copies
        return found
