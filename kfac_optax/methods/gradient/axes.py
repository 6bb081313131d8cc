"""How leaves are seen as tensors: axes merged, split or left alone, equal shapes stacked."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._places import consecutive
from kfac_optax._validate import check_choice, check_real
from kfac_optax.methods.gradient.flat import MANY
from kfac_optax.methods.gradient.stacks import stacked_axes
from kfac_optax.methods.signature import check_size

# what is kept of an axis
FULL = "full"
DIAGONAL = "diagonal"
IDENTITY = "identity"
# which axes have a matrix
ALL = "all"
SHORT = "short"
SIDES = (ALL, SHORT)
_MARK = {FULL: "", DIAGONAL: "d", IDENTITY: "i"}


class Rules(NamedTuple):
    """What becomes of the axes of a leaf, see `scale_by_shampoo`."""

    max_dim: int
    merge: int
    long_axes: str
    vectors: str
    stacked: Callable[[str], int] | None
    sides: str = ALL  # or "short": of all axes the shortest alone has a matrix


class View(NamedTuple):
    """A leaf as `copies` tensors with the axes `axes`, each axis cut into `pieces` of `block`."""

    name: str
    shape: tuple[int, ...]
    copies: int
    axes: tuple[int, ...]
    pieces: tuple[int, ...]
    block: tuple[int, ...]
    kinds: tuple[str, ...]

    @property
    def tensors(self) -> int:
        """Number of tensors of this leaf."""
        return self.copies * math.prod(self.pieces)


class Group(NamedTuple):
    """Leaves whose tensors have one shape and are handled by one batched call."""

    name: str
    views: tuple[View, ...]
    block: tuple[int, ...]
    kinds: tuple[str, ...]

    @property
    def copies(self) -> int:
        """Number of tensors of all leaves."""
        return sum(view.tensors for view in self.views)

    def axes_of(self, kind: str) -> tuple[int, ...]:
        """The axes of one kind."""
        return tuple(i for i, mine in enumerate(self.kinds) if mine == kind)


def check_rules(
    where: str,
    rules: Rules,
    long_axes: tuple,
    vectors: tuple,
) -> Rules:
    """The rules as they are.

    Raises:
      TypeError: a size is no Python integer.
      ValueError: a size is below one, or a word is unknown.
    """
    check_size(where, "max_dim", rules.max_dim)
    check_size(where, "merge", rules.merge)
    check_choice(where, "long_axes", rules.long_axes, long_axes)
    check_choice(where, "vectors", rules.vectors, vectors)
    check_choice(where, "sides", rules.sides, SIDES)
    return rules


def merged(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Axes of length one dropped, neighbours merged from the left while their product is at most
    `limit` and two axes are left.

    >>> print(merged((3, 3, 8, 16), 16), merged((4, 4), 16), merged((1, 5), 16), merged((), 16))
    (9, 8, 16) (4, 4) (5,) (1,)
    """
    # a leaf of one number is a vector of length one
    axes = [n for n in shape if n != 1] or [1]
    out = axes[:1]
    for i, n in enumerate(axes[1:], start=2):
        fits = out[-1] * n <= limit
        # two axes are left at least: no matrix becomes a vector
        left = len(axes) - i
        if fits and len(out) + left >= 2:
            out[-1] *= n
        else:
            out.append(n)
    return tuple(out)


def view_of(
    where: str,
    name: str,
    shape: tuple[int, ...],
    rules: Rules,
) -> View:
    """How one leaf is seen.

    Raises:
      ValueError: `stacked` gives a number of axes that the leaf does not have.

    >>> rules = Rules(max_dim=4, merge=1, long_axes="split", vectors="full", stacked=None)
    >>> print(view_of("here", "w", (6, 2), rules)[3:])
    ((6, 2), (2, 1), (3, 2), ('full', 'full'))
    """
    stack = stacked_axes(where, name, shape, rules.stacked)
    # copies of the stack are tensors of their own
    axes = merged(shape[stack:], rules.merge)
    divided = [_divide(n, len(axes), rules) for n in axes]
    if rules.sides == SHORT and len(axes) > 1:
        # of equal lengths the first
        short = axes.index(min(axes))
        whole = [(1, n, IDENTITY) for n in axes]
        divided = [*whole[:short], divided[short], *whole[short + 1 :]]
    pieces, block, kinds = zip(*divided, strict=True)
    copies = math.prod(shape[:stack])
    return View(name, shape, copies, axes, pieces, block, kinds)


def _divide(length: int, order: int, rules: Rules) -> tuple[int, int, str]:
    """Number of pieces of an axis, their length and what is kept of them."""
    # a vector has no other axis to take a second moment over
    kind = FULL if order > 1 else rules.vectors
    if kind != FULL:
        return 1, length, kind
    if length == 1:
        return 1, length, DIAGONAL
    if length <= rules.max_dim:
        return 1, length, FULL
    if rules.long_axes != "split":
        return 1, length, rules.long_axes
    # the fewest pieces, of nearly equal length
    pieces = -(-length // rules.max_dim)
    return pieces, -(-length // pieces), FULL


def make_groups(
    where: str,
    leaves: Mapping[str, Any],
    rules: Rules,
) -> tuple[Group, ...]:
    """Tensors of equal shape and kind together, in order of first appearance; empty leaves have no
    part.
    """
    check_real(where, leaves)
    members: dict[tuple, list[View]] = {}
    for name, leaf in leaves.items():
        if leaf.size:
            view = view_of(where, name, tuple(leaf.shape), rules)
            members.setdefault((view.block, view.kinds), []).append(view)
    groups = []
    for (block, kinds), views in members.items():
        name = _label(block, kinds)
        groups.append(Group(name, tuple(views), block, kinds))
    return tuple(groups)


def _label(block: tuple[int, ...], kinds: tuple[str, ...]) -> str:
    # lengths, and of those without a matrix what they have instead
    axes = zip(block, kinds, strict=True)
    return "x".join(f"{n}{_MARK[kind]}" for n, kind in axes)


def gather(group: Group, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """Tensors of a group, `[copies, *block]`; pieces are filled up with zeros."""
    tensors = [_cut(leaves[view.name], view) for view in group.views]
    return jnp.concatenate(tensors)


def scatter(
    group: Group,
    tensors: jax.Array,
    some: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Inverse of `gather`: leaves by name.

    With `some`, a scalar bool known only when the step runs, a deep net compiles sooner; where it
    is false the leaves may be any part of the tensors.
    """
    # of each leaf along the axis of copies
    counts = [view.tensors for view in group.views]
    parts = consecutive(tensors, counts, some, many=MANY)
    of_leaves = zip(group.views, parts, strict=True)
    return {view.name: _join(part, view) for view, part in of_leaves}


def _grid(view: View) -> tuple[int, ...]:
    pairs = zip(view.pieces, view.block, strict=True)
    # [pieces_1, block_1, pieces_2, block_2, ...]
    return tuple(itertools.chain.from_iterable(pairs))


def _cut(leaf: jax.Array, view: View) -> jax.Array:
    k = len(view.axes)
    if view.axes == view.block:  # whole: fewer operations to compile for a deep net
        return leaf.reshape(view.copies, *view.axes)
    # [copies, *axes], the last piece of every axis filled up with zeros
    leaf = leaf.reshape(view.copies, *view.axes)
    full = [p * b for p, b in zip(view.pieces, view.block, strict=True)]
    fill = [(0, whole - n) for whole, n in zip(full, view.axes, strict=True)]
    whole_pieces = jnp.pad(leaf, [(0, 0), *fill])
    leaf = whole_pieces.reshape(view.copies, *_grid(view))
    # all pieces in front, then the blocks: [copies, pieces_1, ..., block_1, ...]
    order = [0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2)]
    return leaf.transpose(order).reshape(-1, *view.block)


def _join(tensors: jax.Array, view: View) -> jax.Array:
    k = len(view.axes)
    if view.axes == view.block:
        return tensors.reshape(view.shape)
    tensors = tensors.reshape(view.copies, *view.pieces, *view.block)
    # and back: every axis of pieces beside its block
    order = [0]
    for i in range(1, k + 1):
        order += [i, k + i]
    full = [p * b for p, b in zip(view.pieces, view.block, strict=True)]
    tensors = tensors.transpose(order).reshape(view.copies, *full)
    # what was filled up is cut off
    kept = (slice(None), *(slice(n) for n in view.axes))
    return tensors[kept].reshape(view.shape)
