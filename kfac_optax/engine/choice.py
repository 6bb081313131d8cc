"""Which block each layer gets, and what becomes of the parameters that are left over."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from kfac_optax._parts import boxes_left
from kfac_optax._reasons import COMPLEX, NOT_REAL, NOT_USED
from kfac_optax._types import Block, Layer, Layers, Layout, Part, Uncovered
from kfac_optax._validate import check_choice, check_unused
from kfac_optax.blocks.diagonal.diagonal import diagonal
from kfac_optax.blocks.diagonal.unitwise import unitwise
from kfac_optax.blocks.embedding.embedding import embedding
from kfac_optax.blocks.embedding.tied_embedding import tied_embedding
from kfac_optax.blocks.kronecker.kronecker import INVERSES, kronecker
from kfac_optax.blocks.kronecker.masked import knowing_masks, masked
from kfac_optax.blocks.kronecker.recurrent import OPTIONS, recurrent
from kfac_optax.blocks.kronecker.sua import sua
from kfac_optax.blocks.refusals import of_all_positions

NORMALIZATION = ("unitwise", "diagonal", "pass")
UNCOVERED = ("pass", "diagonal", "graft", "raise")
CONVOLUTION = ("kfc", "sua")
RECURRENCE = ("independent", *OPTIONS)
_PASSED = "normalization='pass'"  # reason of a parameter
BlockOf = Callable[[Layer], Block]

# Up to this many units on either side a layer is damped exactly: four products with eigenvectors
# in place of two with inverses are short there, and so is the eigendecomposition.
NARROW = 128


class ByWidth(NamedTuple):
    """A block for layers of at most `NARROW` inputs and outputs, another for wider ones."""

    narrow: Block
    wide: Block

    def block_of(self, layer: Layer) -> Block:
        """The block of a layer, whose bias row does not count."""
        return self.narrow if max(layer.inputs, layer.outputs) <= NARROW else self.wide


def kronecker_by(
    inverse: str = "auto",
    *,
    sharing: str = "expand",
    positions: int | None = None,
    precision: jax.lax.PrecisionLike = "highest",
) -> Block | ByWidth:
    """The Kronecker block of layers with weights between units, `kronecker(inverse, ...)`.

    Args:
      inverse: as for `kronecker`, or `"auto"`: `"eigh"` up to 128 inputs and outputs, where exact
        damping costs little, and `"cholesky"` above.
      sharing: as for `kronecker`.
      positions: as for `kronecker`.
      precision: as for `kronecker`.

    Raises:
      ValueError: an unknown word, or one out of range.

    >>> chosen = kronecker_by()
    >>> print(chosen.narrow.name, "|", chosen.wide.name)
    kronecker (eigh) | kronecker (cholesky)
    """
    check_choice("kfac", "inverse", inverse, (*INVERSES, "auto"))
    make = functools.partial(kronecker, sharing=sharing, positions=positions, precision=precision)
    return ByWidth(make("eigh"), make("cholesky")) if inverse == "auto" else make(inverse)


def blocks_of(
    linear: Block | ByWidth | BlockOf | None,
    *,
    inverse: str = "auto",
    normalization: str = "unitwise",
    convolution: str = "kfc",
    recurrence: str = "independent",
    precision: jax.lax.PrecisionLike = "highest",
) -> BlockOf:
    """One block for every layer: `linear` for weights between units, and what fits each of the other kinds.

    Layers that get the same `Block` object and have the same shapes are handled by one batched call.

    Args:
      linear: block of dense layers, convolutions and attention projections, or a function that chooses among blocks;
        `None` is the Kronecker block with this `inverse`.
      inverse: of embeddings (`"newton"` is `"cholesky"` for them); `"auto"` decides by the width of each layer: exact
        damping (`"eigh"`) up to 128 inputs and outputs, of embeddings 128 outputs, `"cholesky"` above.
      normalization: `"unitwise"` gives scale and shift of each channel a 2 x 2 block, `"diagonal"` one number each.
      convolution: `"kfc"` measures patches; `"sua"` only channels, where the convolution is a plain one (no groups, not
        transposed).
      recurrence: `"independent"` adds up the steps of a layer that is used several times; `"option1"` and `"option2"`
        model how neighbouring steps correlate, see `recurrent`.
      precision: matmul precision of factor products and solves.

    Raises:
      ValueError: a word is unknown, or has no effect beside a function of the layer; later, where a
        layer is met to whose block a word says nothing.

    >>> import kfac_optax as ko
    >>> block_of = blocks_of(ko.kronecker())
    >>> print(block_of(Layer("norm", "scale_shift", "norm/scale", None, 1, 4, Layout((4,), (1, 4), (0, 1)))).name)
    unit-wise
    """
    check_choice("blocks_of", "convolution", convolution, CONVOLUTION)
    check_choice("blocks_of", "recurrence", recurrence, RECURRENCE)
    linear = kronecker_by(inverse, precision=precision) if linear is None else linear
    # what is no `Block` chooses itself, and the other words would be ignored
    if not isinstance(linear, Block | ByWidth):
        check_unused(
            "blocks_of",
            "a function of the layer (block=), which decides on every layer's block itself: give "
            "the word to what made it, such as blocks_of(...) or low_rank_blocks(...)",
            inverse=(inverse, "auto"),
            normalization=("unitwise" if normalization == "pass" else normalization, "unitwise"),
            convolution=(convolution, "kfc"),
            recurrence=(recurrence, "independent"),
        )
        return knowing_masks(linear)
    lookup = _embeddings(embedding, inverse, precision)
    tied = _embeddings(tied_embedding, inverse, precision)
    by_kind = {
        "scale_shift": unitwise(full=normalization != "diagonal"),
        "diagonal": diagonal(),
    }
    # rows of a layer with a mask are those of a layer without
    rows = linear.narrow if isinstance(linear, ByWidth) else linear
    of_mask = functools.partial(
        masked, sharing=rows.sharing, positions=rows.positions, precision=precision
    )
    of_channels = sua(precision=precision)
    in_time = None if recurrence == "independent" else recurrent(recurrence, precision=precision)

    def block_of(layer: Layer) -> Block:
        if layer.kind in by_kind:
            return by_kind[layer.kind]
        if layer.mask is not None:
            return of_mask(layer)
        if layer.kind in ("embedding", "tied_embedding"):
            return (lookup if layer.kind == "embedding" else tied)(layer)
        # channels are known of plain convolutions only
        if convolution == "sua" and layer.channels:
            return of_all_positions(of_channels, "convolution='sua'", layer, rows)
        if in_time is not None and layer.uses > 1 and layer.kind != "conv":
            return of_all_positions(in_time, f"recurrence={recurrence!r}", layer, rows)
        return linear.block_of(layer) if isinstance(linear, ByWidth) else linear

    return block_of


def _embeddings(make: Callable[..., Block], inverse: str, precision: Any) -> BlockOf:
    """The block of an embedding table."""
    words = {"auto": ("eigh", "cholesky"), "newton": ("cholesky", "cholesky")}
    narrow, wide = (make(x, precision=precision) for x in words.get(inverse, (inverse, inverse)))
    return lambda layer: narrow if layer.outputs <= NARROW else wide


def beside_blocks(normalization: str) -> str:
    """What is left of the word beside a function of the layer that was made with it: whether
    normalisation layers are left out.

    >>> print(beside_blocks("diagonal"), beside_blocks("pass"))
    unitwise pass
    """
    return "pass" if normalization == "pass" else "unitwise"


def cover(
    layers: Layers,
    *,
    uncovered: str = "pass",
    normalization: str = "unitwise",
    where: str = "cover",
) -> Layers:
    """The layers a transformation handles: without normalisation layers, or with left-over
    parameters as layers.

    Args:
      layers: from `fisher.layers(...)`.
      uncovered: what becomes of parameters without a layer: `"pass"` and `"graft"` leave them out,
        the latter marked to get the size of the others' updates; `"diagonal"` makes each a layer of
        its own, `"raise"` is an error.
      normalization: `"pass"` leaves out scale and shift of normalisation layers.
      where: for errors.

    Raises:
      TypeError: `layers` is something else.
      ValueError: a word is unknown; `"raise"` and something is left over.
    """
    if not isinstance(layers, Layers):
        raise TypeError(
            f"{where}: layers is a {type(layers).__name__}; expected the result of fisher.layers(params, *args)."
        )
    check_choice(where, "uncovered", uncovered, UNCOVERED)
    check_choice(where, "normalization", normalization, NORMALIZATION)
    if uncovered == "raise":
        _refuse(where, layers)
    rest = _boxes_used(layers) if uncovered == "diagonal" else []
    if normalization == "pass":
        layers = leave_out(layers, ("scale_shift",), _PASSED)
    kept, left = list(layers.layers), list(layers.uncovered)
    if uncovered == "diagonal":
        # what has no real gradient has no second moment either
        passed = (NOT_USED, COMPLEX, NOT_REAL, _PASSED)
        kept += [_single(u) for u in left if u.reason not in passed] + rest
        left = [u for u in left if u.reason in passed]
    # what a coverage table said of blocks and bytes was said of other layers
    return dataclasses.replace(
        layers,
        layers=tuple(kept),
        uncovered=tuple(left),
        blocks=(),
        state_bytes=(),
        devices=(),
        graft=layers.graft or uncovered == "graft",
    )


def _boxes_used(layers: Layers) -> list[Layer]:
    """What no layer has of parameters that layers share out, where they have other uses."""
    partly: dict[str, Uncovered] = {}
    for layer in layers:
        partly |= {u.path: u for u in layer.partly}
    single: list[Layer] = []
    for name, left in boxes_left(layers).items():
        if name in partly:
            single += [_single(partly[name], box) for box in left]
    return single


def leave_out(layers: Layers, kinds: Sequence[str], reason: str) -> Layers:
    """Layers without those of some kinds, whose parameters are left over for a reason, in which
    `{kind}` is that of the layer.
    """
    left = list(layers.uncovered)
    for layer in layers:
        if layer.kind in kinds:
            why = reason.format(kind=layer.kind)
            left += [Uncovered(name, layer.stored, why) for name in layer.leaves]
    kept = tuple(layer for layer in layers if layer.kind not in kinds)
    left = list(dict.fromkeys(left))  # layers may be parts of one parameter
    return dataclasses.replace(layers, layers=kept, uncovered=tuple(left))


def _refuse(where: str, layers: Layers) -> None:
    """Raises where a parameter has no block, or one that does not see all of its uses."""
    partly: list[Uncovered] = []
    for layer in layers:
        partly += layer.partly
    found = []
    for what, those in (
        ("no block covers", layers.uncovered),
        ("a block covers only a part of the uses of", partly),
    ):
        if those:
            found.append("\n".join([what, *(f"  {u}" for u in those)]))
    if found:
        raise ValueError(
            f"{where}: uncovered='raise' and {chr(10).join(found)}\nUse uncovered='pass' to pass the gradient of what no "
            "block covers on, 'graft' to give it the size of the preconditioned updates, or 'diagonal'."
        )


def check_coupled(layers: Layers, where: str) -> None:
    """Raises where a coupling has no layer to see.

    Raises:
      ValueError: no layer with weights between units has rows of examples.
    """
    if not any(layer.coupled for layer in layers):
        names = (
            ", ".join(x.path or "(root)" for x in layers if x.between_units)
            or "none with weights between units"
        )
        raise ValueError(
            f"{where}: no layer is left for the coupling, which needs sums per example. Axis 0 of a layer's input has to be "
            f"the examples: reshape to [examples, positions, features] instead of [examples * positions, features], or "
            f"use `kfac` without a coupling. Layers without rows of examples: {names}."
        )


def _single(parameter: Uncovered, box: Part | None = None) -> Layer:
    """A parameter, or a box of it, as a layer on its own."""
    shape = parameter.shape if box is None else box.sizes
    # one row of n entries, each with a curvature of its own
    return Layer(
        path=f"{parameter.path}{box or ''}",
        kind="diagonal",
        kernel=parameter.path,
        bias=None,
        inputs=1,
        outputs=math.prod(shape),
        layout=Layout(shape, shape, tuple(range(len(shape)))),
        notes=(parameter.reason,),
        part=box,
    )
