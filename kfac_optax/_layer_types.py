"""Layers as tracing finds them, and what a block has to know about their uses; no logic."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from kfac_optax._table import coverage_table

PyTree = Any


class Layout(NamedTuple):
    """How a stored weight becomes matrices `[groups, inputs, outputs]`.

    The leaf (behind the axes of its stack) is reshaped to `split`, transposed to `order`, and
    reshaped again.
    """

    shape: tuple[int, ...]  # as stored
    split: tuple[int, ...]
    order: tuple[int, ...]


class Part(NamedTuple):
    """A box of a stored parameter, along its axes behind the stack: `w[:, :4]`, `layers[2]`."""

    shape: tuple[int, ...]  # of what it is a part of
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """What picks it."""
        pairs = zip(self.starts, self.sizes, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)

    def __str__(self) -> str:
        """As one writes it, `[2]` or `[:, 0:4]`."""
        words = []
        for start, size, n in zip(self.starts, self.sizes, self.shape, strict=True):
            one = str(start) if size == 1 else f"{start}:{start + size}"
            words.append(":" if size == n else one)
        while words[1:] and words[-1] == ":":
            del words[-1]
        return f"[{', '.join(words)}]"


class Staircase(NamedTuple):
    """Which entries of a matrix are there, `mask[i, j] = rows[i] < columns[j]`: steps, once rows and
    columns are in order.

    Attributes:
      rows: `[p]`, place of each row among all, those with most entries first.
      columns: `[q]`, entries of each column.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Uncovered:
    """A parameter that no curvature block owns, or not all uses of which are measured, and why.

    Attributes:
      path, shape: of the parameter.
      reason: why.
      where: lines of code that use it, `file:line`, if it is used.
    """

    path: str
    shape: tuple[int, ...]
    reason: str
    where: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        """As errors list it."""
        place = f" ({self.where})" if self.where else ""
        return f"{self.path or '(root)'} {self.shape}: {self.reason}{place}"


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters handled together by one curvature block.

    Attributes:
      path: normalised path of the module in the parameter tree, for example `"Dense_0"`.
      kind: what the layer computes: `"dense"`, `"einsum"`, `"conv"`, `"embedding"`,
        `"tied_embedding"`, `"scale_shift"`, `"masked"` for a matrix of which only some entries are
        there, or `"diagonal"` for a parameter on its own.
      kernel: path of the weight leaf (of the scale, or of the shift where there is no scale).
      bias: path of the bias leaf, or `None`.
      inputs, outputs: sizes of the weight as a matrix, of one group.
      layout: how the stored weight, or the part of it, becomes matrices.
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
      scale_free: whether it was proven that the outputs of the traced function stay the same when
        all of its parameters are multiplied by one `c > 0`, but for the epsilons of norms: a
        normalisation follows.
      part, bias_part: the part of the weight leaf and of the bias leaf that it has, where those are
        shared out among several layers; `None` for all of it.
      mask: entries of the weight as a matrix that the layer uses, `None` for all of them.
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
    scale_free: bool = False
    # what of its leaves it has
    part: Part | None = None
    bias_part: Part | None = None
    mask: Staircase | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the weight leaf."""
        return *self.stack, *(self.layout.shape if self.part is None else self.part.shape)

    def box(self, part: Part | None) -> Any:
        """What picks its part of a leaf."""
        return ... if part is None else (slice(None),) * len(self.stack) + part.slices

    @property
    def copies(self) -> int:
        """Number of matrices: layers in the stack times groups of each."""
        return math.prod(self.stack) * self.groups

    @property
    def coupled(self) -> bool:
        """Whether a coupling sees the layer: it has rows of examples, and weights between units."""
        # sums of rows are those of a whole matrix
        return self.between_units and self.per_example and self.mask is None

    @property
    def given_rows(self) -> bool:
        """Whether its uses differ, so that blocks are given rows with the bias coordinate in them."""
        return (self.mixed or self.swapped) and self.kind != "scale_shift"

    @property
    def between_units(self) -> bool:
        """Whether it has weights between units, not only scales or shifts of them."""
        return self.kind not in ("scale_shift", "diagonal")

    @property
    def leaves(self) -> tuple[str, ...]:
        """Paths of its parameters: the kernel, and the bias where it has one."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

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
    devices: tuple[str, ...] = ()
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
