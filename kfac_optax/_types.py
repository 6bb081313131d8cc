"""Data passed between the parts of the package; no logic.

Words: a *site* is one tapped call seen by tracing, a *layer* the parameters that one curvature
block owns (kernel and bias), a *bucket* the layers of equal shape that one batched call serves.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from kfac_optax._table import coverage_table

PyTree = Any
Numeric = float | int | jax.Array
ScalarOrSchedule = Numeric | Callable[[Any], Numeric]


class Layout(NamedTuple):
    """How a stored weight becomes matrices `[groups, inputs, outputs]`.

    The leaf (behind the axes of its stack) is reshaped to `split`, transposed to `order`, and
    reshaped again.
    """

    shape: tuple[int, ...]  # as stored
    split: tuple[int, ...]
    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Uncovered:
    """A parameter that no curvature block owns, or not all uses of which are measured, and why."""

    path: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters handled together by one curvature block.

    Attributes:
      path: normalised path of the module in the parameter tree, for example `"Dense_0"`.
      kind: what the layer computes: `"dense"`, `"einsum"`, `"conv"`, `"embedding"`,
        `"tied_embedding"`, `"scale_shift"`, or `"diagonal"` for a parameter on its own.
      kernel: path of the weight leaf (of the scale, or of the shift where there is no scale).
      bias: path of the bias leaf, or `None`.
      inputs, outputs: sizes of the weight as a matrix, of one group.
      layout: how the stored weight becomes matrices.
      stack: leading axes of a stacked layer (`nn.scan` over layers), `()` otherwise.
      groups: independent matrices of one layer (groups of a convolution, batched axes of an
        einsum).
      channels: input channels of a plain convolution (no groups, not transposed), 0 for everything
        else.
      uses: how often the layer runs in one evaluation (tied layers, steps of a scan over time).
      rows: rows of input over all uses in the traced batch.
      notes: what the statistics leave out, for the coverage table.
      per_example: whether axis 0 of its rows is the examples, in all uses. A table of positions has
        rows that all examples share: a block can measure it, a coupling cannot.
      partly: its parameters with uses that the statistics do not see.
      mixed: some of its uses have no part in the bias.
      swapped: some of its uses multiply by the transposed weight, as cotangents of an inner
        derivative do.
    """

    # its leaves in the parameter tree
    path: str
    kind: str
    kernel: str
    bias: str | None
    # as matrices [copies, inputs, outputs]
    inputs: int
    outputs: int
    layout: Layout
    stack: tuple[int, ...] = ()
    groups: int = 1
    channels: int = 0
    # what this trace has seen of it
    uses: int = 1
    rows: int = 0
    notes: tuple[str, ...] = ()
    per_example: bool = True
    partly: tuple[Uncovered, ...] = ()
    mixed: bool = False
    swapped: bool = False

    @property
    def copies(self) -> int:
        """Number of matrices: layers in the stack times groups of each."""
        return math.prod(self.stack) * self.groups

    @property
    def coupled(self) -> bool:
        """Whether a coupling sees the layer: it has rows of examples, and weights between units."""
        return self.between_units and self.per_example

    @property
    def given_rows(self) -> bool:
        """Whether its uses differ, so that blocks are given rows with the bias coordinate in them."""
        return (self.mixed or self.swapped) and self.kind != "scale_shift"

    @property
    def between_units(self) -> bool:
        """Whether it has weights between units, not only scales or shifts of them."""
        return self.kind not in ("scale_shift", "diagonal")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `[p, q]` of the canonical gradient matrix; `p` counts the bias row."""
        return self.inputs + (self.bias is not None), self.outputs


@dataclasses.dataclass(frozen=True)
class Layers:
    """Coverage of a model: its layers in order of execution and the parameters left over.

    Made by `fisher.layers(params, ...)`; `print(layers)` shows the coverage table, with blocks and
    bytes where `coverage` has added them. With `graft` the gradients of the
    parameters left over get the size of the updates that blocks make. What the statistics of all
    layers leave out is said in the lines `remarks` at its end.
    """

    # what tracing found
    layers: tuple[Layer, ...]
    uncovered: tuple[Uncovered, ...] = ()
    # added by `coverage`
    blocks: tuple[str, ...] = ()
    state_bytes: tuple[int, ...] = ()
    coupling: str = ""
    coupling_bytes: int = 0
    graft: bool = False
    remarks: tuple[str, ...] = ()

    def __iter__(self):
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        return coverage_table(self)


class Use(NamedTuple):
    """What a block has to know about one use of a layer to turn rows into a mean over examples.

    Attributes:
      layer: whose use it is.
      examples: N of the batch, of the heads that this use serves.
      rows: rows of input summed over all uses of the layer, if all had as many examples as this.
      dtype: of the statistics, float32 or wider.
      weights: `[*rows of this use]`, mean one; already inside `g`, still missing in `a`.
      head: the only head of the prediction that this use serves, by its order in the tree; `None`
        if it serves several.
    """

    layer: Layer
    examples: int
    rows: float
    dtype: Any
    weights: jax.Array | None = None
    head: int | None = None

    @property
    def bias(self) -> bool:
        """Whether the layer has a bias row."""
        return self.layer.bias is not None

    @property
    def inputs(self) -> int:
        """`p` without the bias row; the vocabulary of an embedding."""
        return self.layer.inputs

    @property
    def outputs(self) -> int:
        """`q`."""
        return self.layer.outputs


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
      solve_rows: `(inverse, a, g, damping) -> a^T g preconditioned`, from rows `a [R, p]` and
        `g [R, q]`; or `None` where that would cost more than `solve`.
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
    solve_rows: Callable[..., jax.Array | None] | None = None
    first_moments: bool = False
    absorbs: str = "columns"
    reads_inverse: bool = False
    per_example: bool = False
    # its own say about refreshes, and what posteriors need of it
    due: Callable[..., tuple[jax.Array, PyTree]] | None = None
    root_solve: Callable[..., jax.Array] | None = None
    logdet: Callable[..., jax.Array] | None = None


class Average(NamedTuple):
    """How a new statistic is averaged in: `S <- weight S + (1 - weight) S_new`, as number `count`
    of those accepted. `decay` is the bound of the weight, `weight = min(1 - 1/count, decay)`.
    """

    weight: jax.Array
    count: jax.Array
    decay: jax.Array


# canonical matrices of all layers with a block, one `[copies, p, q]` for every bucket
Vector = list[jax.Array]


class Directions(NamedTuple):
    """An update that has not been added up yet, for step rules that weigh its parts.

    Attributes:
      parts: trees like the gradient whose sum is the update; what no block covers is in the first,
        zero in the others.
    """

    parts: tuple[PyTree, ...]


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
