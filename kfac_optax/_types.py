"""Data passed between the parts of the package; no logic.

Words: a *site* is one tapped call seen by tracing, a *layer* the parameters that one curvature block owns
(kernel and bias), a *bucket* the layers of equal shape that one batched call serves.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

PyTree = Any
Numeric = float | int | jax.Array
ScalarOrSchedule = Numeric | Callable[[Any], Numeric]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters handled together by one curvature block.

    Attributes:
      path: normalised path of the module in the parameter tree, for example `"Dense_0"`.
      kind: what the layer computes (`"dense"`).
      kernel: path of the weight leaf, of shape `[*stack, inputs, outputs]`.
      bias: path of the bias leaf `[*stack, outputs]`, or `None`.
      inputs, outputs: sizes of the weight.
      stack: leading axes of a stacked layer (`nn.scan` over layers), `()` otherwise.
      uses: how often the layer runs in one evaluation (tied layers, steps of a scan over time).
      rows: rows of input over all uses in the traced batch.
      transposed: the weight is stored `[*stack, outputs, inputs]`.
      notes: what the statistics leave out, for the coverage table.
    """

    path: str
    kind: str
    kernel: str
    bias: str | None
    inputs: int
    outputs: int
    stack: tuple[int, ...] = ()
    uses: int = 1
    rows: int = 0
    transposed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def copies(self) -> int:
        """Number of layers in the stack."""
        return math.prod(self.stack)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `[p, q]` of the canonical gradient matrix; `p` counts the bias row."""
        return self.inputs + (self.bias is not None), self.outputs


@dataclasses.dataclass(frozen=True)
class Uncovered:
    """A parameter that no curvature block owns, and why."""

    path: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Layers:
    """Coverage of a model: its layers in order of execution and the parameters left over.

    Made by `fisher.layers(params, ...)`; `print(layers)` shows the coverage table.
    """

    layers: tuple[Layer, ...]
    uncovered: tuple[Uncovered, ...] = ()
    block: str = ""
    state_bytes: tuple[int, ...] = ()
    coupling: str = ""
    coupling_bytes: int = 0

    def __iter__(self):
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        header = ("layer", "kind", "kernel", "bias", "uses", "block", "state bytes")
        sizes = self.state_bytes or (0,) * len(self.layers)
        rows = [
            (
                x.path or "(root)",
                x.kind,
                _shape(*x.stack, x.inputs, x.outputs),
                "yes" if x.bias is not None else "no",
                str(x.uses),
                "; ".join((self.block, *x.notes)),
                f"{n:,}",
            )
            for x, n in zip(self.layers, sizes, strict=True)
        ]
        if self.coupling:
            rows.append(("(all layers)", "coupling", "", "", "", self.coupling, f"{self.coupling_bytes:,}"))
        rows.append(("total", "", "", "", "", "", f"{sum(sizes) + self.coupling_bytes:,}"))
        text = _columns(header, rows)
        if self.uncovered:
            left = [(u.path, _shape(*u.shape), u.reason) for u in self.uncovered]
            text += "\n\n" + _columns(("not covered", "shape", "reason"), left)
        return text


class Use(NamedTuple):
    """What a block has to know about one use of a layer to turn rows into a mean over examples."""

    bias: bool
    outputs: int  # q
    examples: int  # N of the batch
    rows: int  # rows of input summed over all uses of the layer
    dtype: Any  # dtype of the statistics, float32 or wider
    weights: jax.Array | None = None  # [*rows of this use], mean one; already inside g, still missing in a
    inputs: int = 0  # p without the bias row; the vocabulary of an embedding


class Block(NamedTuple):
    """A per-layer curvature approximation as five pure functions (one layer each; buckets are mapped over).

    Attributes:
      name: word for the coverage table.
      init: `(p, q, dtype) -> statistic`, the value that stands for "nothing measured yet".
      measure: `(a, g, use) -> statistic`, contribution of one use; `g` is `None` where only inputs are measured.
      factorize: `(statistic, damping) -> held`.
      solve: `(held, V, damping) -> V preconditioned`, `V` of shape `[p, q]`.
      multiply: `(statistic, V) -> F V`, undamped.
      rows: `measure` sees all uses of the layer at once, `a [N, T, p]` and `g [N, T, q]` with steps in time or
        positions on axis 1, instead of being added up over uses.
    """

    name: str
    init: Callable[..., PyTree]
    measure: Callable[..., PyTree]
    factorize: Callable[..., PyTree]
    solve: Callable[..., jax.Array]
    multiply: Callable[..., jax.Array]
    rows: bool = False


class Coupling(NamedTuple):
    """How layers talk: a coarse statistic over all layers, and the correction it gives.

    Attributes:
      name: word for the coverage table.
      rows: whether `measure` returns rows kept apart per use (`[N, R]`) or values summed over uses.
      init: `(L, dtype) -> statistic`.
      measure: `(a, g, use) -> tree` for one use of one layer.
      reduce: `(measured, examples) -> statistic`, from the values of all layers stacked in order.
      factorize: `(statistic, sizes) -> held`, `sizes` the parameter counts `[L]`.
      solve: `(held, restricted, damping, sizes) -> correction`, both `[L]`.
      matrix: `statistic -> [L, L]` coarse Fisher.
      fine_weight, coarse_weight: weights of the two levels.
    """

    name: str
    rows: bool
    init: Callable[..., PyTree]
    measure: Callable[..., PyTree]
    reduce: Callable[..., PyTree]
    factorize: Callable[..., PyTree]
    solve: Callable[..., jax.Array]
    matrix: Callable[..., jax.Array]
    fine_weight: Numeric = 1.0
    coarse_weight: Numeric = 1.0


class Bucket(NamedTuple):
    """Layers of one shape, stacked on a leading axis of length `copies`."""

    name: str
    layers: tuple[Layer, ...]
    shape: tuple[int, int]

    @property
    def copies(self) -> int:
        return sum(layer.copies for layer in self.layers)


def _shape(*sizes: int) -> str:
    return "x".join(map(str, sizes)) or "()"


def _columns(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
