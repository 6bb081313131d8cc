"""Which leaves a preconditioner of matrices should get, and what becomes of their axes."""

import fnmatch
from collections.abc import Callable, Iterable

import jax

from kfac_optax._table import columns
from kfac_optax._tree import named_leaves, path_name
from kfac_optax._types import PyTree
from kfac_optax.methods.gradient.axes import (
    ALL,
    DIAGONAL,
    FULL,
    IDENTITY,
    Rules,
    View,
    check_rules,
    merged,
    view_of,
)
from kfac_optax.methods.gradient.stacks import stacked_axes

# components of paths; what they name has one row for a symbol or a class, and most are rarely seen
EMBEDDINGS_AND_HEADS = ("*embed*", "wte", "wpe", "head", "lm_head", "logits", "classifier")


def matrix_labels(
    params: PyTree,
    *,
    others: Iterable[str] = EMBEDDINGS_AND_HEADS,
    more_others: Iterable[str] = (),
    stacked: Callable[[str], int] | None = None,
    matrix: str = "matrix",
    other: str = "other",
) -> PyTree:
    """Labels for `optax.partition`: weights between units here, embeddings, heads and vectors there.

    A leaf is a matrix if at least two of its axes are longer than one, those of a stack not
    counted, and if no pattern names it. Patterns are shell wildcards without regard to case. One
    without `/` is compared with every component of a path, one with `/` with the whole path.

    Args:
      params: a tree of arrays; names are paths, `"block/kernel"`.
      others: patterns of embeddings and heads, by the usual names. A head called `Dense_3` is
        known to you alone.
      more_others: patterns beside those.
      stacked: `name -> number` of leading axes that only count equal parameters.
      matrix: label of matrices.
      other: label of everything else.

    Returns:
      A tree of labels like the parameters.

    Raises:
      ValueError: one of `more_others` names no leaf; both labels are the same; `stacked` gives no
        number of axes of a leaf.

    >>> import jax.numpy as jnp
    >>> params = {"embed": jnp.ones((9, 4)), "Dense_0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    >>> print(matrix_labels(params))
    {'Dense_0': {'bias': 'other', 'kernel': 'matrix'}, 'embed': 'other'}
    """
    # a single pattern may be a string
    more = (more_others,) if isinstance(more_others, str) else tuple(more_others)
    patterns = ((others,) if isinstance(others, str) else tuple(others)) + more
    names = named_leaves(params)
    for pattern in more:  # a misspelt name would leave a head where it should not be
        if not any(_named(name, (pattern,)) for name in names):
            raise ValueError(
                f"matrix_labels: {pattern!r} names no leaf; expected a component or the whole of "
                f"one of {sorted(names)}."
            )
    if matrix == other:
        raise ValueError(f"matrix_labels: both labels are {matrix!r}; expected two.")

    def label(path: tuple, leaf: jax.Array) -> str:
        name = path_name(path)
        # a scale [layers, n] of scanned layers is a vector of each
        own = leaf.shape[stacked_axes("matrix_labels", name, leaf.shape, stacked) :]
        is_matrix = len(merged(own, 1)) > 1 and leaf.size > 0
        return matrix if is_matrix and not _named(name, patterns) else other

    return jax.tree_util.tree_map_with_path(label, params)


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns means this path."""
    whole = name.lower()
    for pattern in patterns:
        # a pattern with a slash means a whole path
        texts = [whole] if "/" in pattern else whole.split("/")
        if any(fnmatch.fnmatchcase(text, pattern.lower()) for text in texts):
            return True
    return False


def axes_table(
    params: PyTree,
    *,
    max_dim: int = 1024,
    merge: int = 16,
    long_axes: str = "split",
    vectors: str = "full",
    sides: str = ALL,
    stacked: Callable[[str], int] | None = None,
    labels: PyTree | None = None,
) -> str:
    """What becomes of every axis of every leaf, as a table to print.

    The words are those of `scale_by_shampoo`, `scale_by_soap` and their relatives, with the
    defaults of the first; those of SOAP are `max_dim=4096, long_axes="identity",
    vectors="identity"`. The last column counts the numbers of one statistic of the leaf, `n^2` of
    an axis with a matrix and `n` of a diagonal.

    Args:
      params: a tree of arrays, or of their shapes.
      max_dim: axes longer than this are long.
      merge: neighbouring axes are merged while their product is at most this and two are left.
      long_axes: `"split"`, `"diagonal"` or `"identity"`.
      vectors: `"full"`, `"diagonal"` or `"identity"`.
      sides: `"all"`, or `"short"` as in `scale_by_soap`.
      stacked: `name -> number` of leading axes that only count equal parameters.
      labels: a tree of labels, such as `matrix_labels` gives; one more column.

    Returns:
      The table.

    Raises:
      TypeError: a size is no Python integer.
      ValueError: a size is below one, or a word is unknown; the labels are of another tree.

    >>> import jax.numpy as jnp
    >>> print(axes_table({"kernel": jnp.ones((3, 3, 8, 40)), "bias": jnp.ones(40)}, max_dim=30))
    leaf    shape     axes                                  statistic
    ------  --------  ------------------------------------  ---------
    bias    40        40: 2 matrices 20x20                  800
    kernel  3x3x8x40  9: 9x9; 8: 8x8; 40: 2 matrices 20x20  1,090
    """
    where = "axes_table"
    rules = Rules(max_dim, merge, long_axes, vectors, stacked, sides)
    # words of any preconditioner: SOAP leaves axes alone, Shampoo keeps diagonals
    kinds = (DIAGONAL, IDENTITY)
    check_rules(where, rules, ("split", *kinds), (FULL, *kinds))
    words = _labels_of(where, params, labels)
    rows = []
    for name, leaf in named_leaves(params).items():
        shape = "x".join(map(str, leaf.shape)) or "()"
        label = () if words is None else (words[name],)
        # no tensor, hence no statistic
        if not leaf.size:
            rows.append((name, shape, *label, "no entries", "0"))
            continue
        view = view_of(where, name, tuple(leaf.shape), rules)
        rows.append((name, shape, *label, _axes(view), f"{_numbers(view):,}"))
    header = ("leaf", "shape", *(() if words is None else ("label",)), "axes", "statistic")
    return columns(header, rows)


def _labels_of(
    where: str,
    params: PyTree,
    labels: PyTree | None,
) -> dict[str, str] | None:
    if labels is None:
        return None
    found = {name: str(label) for name, label in named_leaves(labels).items()}
    if found.keys() != named_leaves(params).keys():
        raise ValueError(
            f"{where}: labels are of the leaves {sorted(found)}; expected those of the parameters, "
            f"{sorted(named_leaves(params))}."
        )
    return found


def _axes(view: View) -> str:
    """The axes of a leaf and what each gets."""
    said = []
    for whole, pieces, n, kind in zip(view.axes, view.pieces, view.block, view.kinds, strict=True):
        # what an axis holds, and how often
        gets = {FULL: f"{n}x{n}", DIAGONAL: "diagonal", IDENTITY: "as it is"}[kind]
        if pieces > 1:
            gets = f"{pieces} matrices {gets}"
        said.append(f"{whole}: {gets}")
    stack = f"{view.copies} times " if view.copies > 1 else ""
    return stack + "; ".join(said)


def _numbers(view: View) -> int:
    """Entries of one statistic of every tensor of a leaf."""
    # n^2 for a matrix, n for a diagonal
    each = 0
    for n, kind in zip(view.block, view.kinds, strict=True):
        each += {FULL: n * n, DIAGONAL: n, IDENTITY: 0}[kind]
    return each * view.tensors
