"""The coverage table, as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kfac_optax._reasons import NO_EXAMPLES, NOT_USED

if TYPE_CHECKING:
    from kfac_optax._layer_types import Layer, Layers, Uncovered


def coverage_table(layers: "Layers") -> str:
    """Every layer with its kind, shape and uses, then every parameter that is left over.

    With blocks and bytes of state where they are known; what the statistics leave out stands beside
    its layer.
    """
    header = ("layer", "kind", "kernel", "bias", "uses")
    # one line for every layer, in order of execution
    rows = [_geometry(layer) for layer in layers]
    notes = [(*layer.notes, *_outside(layer)) for layer in layers]
    # blocks and bytes are known after `coverage`; before, notes have a column of their own
    if layers.blocks:
        header += ("block", "state bytes")
        rows = _with_blocks(layers, rows, notes)
        if layers.devices:
            header += ("kept on devices",)
            # below the layers stand the coupling and the total
            more = (*layers.devices, *[""] * (len(rows) - len(layers.devices)))
            rows = [(*row, kept) for row, kept in zip(rows, more, strict=True)]
    elif any(notes):
        header += ("notes",)
        pairs = zip(rows, notes, strict=True)
        rows = [(*row, "; ".join(said)) for row, said in pairs]
    parts = [columns(header, rows)]
    if layers.uncovered:
        header = ("not covered", "shape", "gets", "reason")
        left = [_left_over(layers, parameter) for parameter in layers.uncovered]
        parts.append(columns(header, left))
    return "\n\n".join((*parts, *layers.remarks))


def _with_blocks(
    layers: "Layers",
    rows: list[tuple[str, ...]],
    notes: list[tuple[str, ...]],
) -> list[tuple[str, ...]]:
    """The rows of layers with block and bytes, that of the coupling, and the total."""
    # a block with what its statistics leave out
    triples = zip(layers.blocks, notes, layers.state_bytes, strict=True)
    made: list[tuple[str, ...]] = []
    for row, (block, said, size) in zip(rows, triples, strict=True):
        words = "; ".join((block, *said))
        made.append((*row, words, f"{size:,}"))
    rows = made
    if layers.coupling:
        across = f"{layers.coupling_bytes:,}"
        rows.append(("(all layers)", "coupling", "", "", "", layers.coupling, across))
    total = sum(layers.state_bytes) + layers.coupling_bytes
    rows.append(("total", "", "", "", "", "", f"{total:,}"))
    return rows


def _geometry(layer: "Layer") -> tuple[str, ...]:
    """What the layer is, whatever block it gets."""
    # [*stack, groups, inputs, outputs]
    groups = (layer.groups,) if layer.groups > 1 else ()
    shape = _shape(*layer.stack, *groups, layer.inputs, layer.outputs)
    bias = "no" if layer.bias is None else "yes"
    # a model that is one layer has no path
    return layer.path or "(root)", layer.kind, shape, bias, str(layer.uses)


def _left_over(layers: "Layers", parameter: "Uncovered") -> tuple[str, ...]:
    """A parameter that no block owns, why, and in which lines of code it is used."""
    place = f" ({parameter.where})" if parameter.where else ""
    shape = _shape(*parameter.shape)
    gets = _gets(layers, parameter)
    return parameter.path or "(root)", shape, gets, parameter.reason + place


def _gets(layers: "Layers", parameter: "Uncovered") -> str:
    """What becomes of the gradient of a parameter that no block owns."""
    if parameter.reason == NOT_USED:
        return "no gradient"
    if layers.graft:
        return "gradient with the size of the preconditioned updates"
    return "gradient passed on"


def _outside(layer: "Layer") -> tuple[str, ...]:
    if layer.between_units and not layer.per_example:
        return (NO_EXAMPLES,)
    return ()


def _shape(*sizes: int) -> str:
    return "x".join(map(str, sizes)) or "()"


def columns(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text under a header, every column as wide as its longest cell."""
    # widths go by column, lines by row
    table = [header, *rows]
    by_column = zip(*table, strict=True)
    widths = [max(map(len, column)) for column in by_column]
    lines = [_line(row, widths) for row in table]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(row: tuple[str, ...], widths: Sequence[int]) -> str:
    cells = zip(row, widths, strict=True)
    padded = [cell.ljust(width) for cell, width in cells]
    # the last column needs no filling
    return "  ".join(padded).rstrip()
