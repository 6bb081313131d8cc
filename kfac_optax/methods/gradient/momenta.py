"""The end of a step: the norm of another transformation, and momentum."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kfac_optax._tree import named_leaves, select
from kfac_optax._types import PyTree
from kfac_optax._validate import check_choice
from kfac_optax.linalg.division import positive_or_one
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axes import Group, gather
from kfac_optax.methods.gradient.axiswise import Start, Step
from kfac_optax.step_rules._per_layer import norms

Tensors = dict[str, jax.Array]  # by group
Lengths = optax.GradientTransformationExtraArgs

GRAFTS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "adam": optax.scale_by_adam,
    "rms": optax.scale_by_rms,
    "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-10),
    "sign": optax.scale_by_sign,  # of norm sqrt(n)
}
_NORMALIZED = "_normalized"


class Finish(NamedTuple):
    """What becomes of a preconditioned gradient.

    Attributes:
      start: `Start -> (trace, graft)`, momenta and the state of what gives the norm.
      apply: `(step, tensors, trace, graft) -> (tensors, trace, graft)`.
    """

    start: Callable[[Start], tuple[Any, PyTree]]
    apply: Callable[..., tuple[Tensors, Any, PyTree]]


def graft_of(where: str, graft: Any) -> Lengths | None:
    """The transformation of a word, or a given one; `None` for none.

    Raises:
      ValueError: the word is unknown.
    """
    if graft is None:
        return None
    if isinstance(graft, str):
        words = (*GRAFTS, *(word + _NORMALIZED for word in GRAFTS))
        check_choice(where, "graft", graft, words)
        made = GRAFTS[graft.removesuffix(_NORMALIZED)]()
        if graft.endswith(_NORMALIZED):
            made = optax.chain(_normalized(), made)
        graft = made
    return optax.with_extra_args_support(graft)


def _normalized() -> optax.GradientTransformation:
    """Every leaf divided by its norm; a leaf of zeros stays."""

    def unit(x: jax.Array) -> jax.Array:
        size = norms(x.reshape(1, 1, -1))[0]
        return x / positive_or_one(size)

    def units(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(unit, updates)

    return optax.stateless(units)


def graft_then_momentum(
    lengths: Lengths | None,
    *,
    momentum: bool,
    nesterov: bool = False,
) -> Finish:
    """Norms of `lengths`, then `M <- momentum M + U`; with `nesterov` the update is
    `momentum M + U`.
    """

    def start(begin: Start) -> tuple[Any, PyTree]:
        return zeros(begin) if momentum else (), start_lengths(lengths, begin)

    def apply(step: Step, tensors: Tensors, trace: Any, graft: PyTree):
        # S <- S ||Q|| / ||S||, then M <- momentum M + S
        if lengths is not None:
            wanted, graft = updates_of(lengths, step, graft)
            tensors = with_norms(step, tensors, wanted)
        if not momentum:
            return tensors, trace, graft
        trace = traced(step, trace, tensors)
        ahead = trace
        if nesterov:
            ahead = traced(step, trace, tensors)
        return ahead, trace, graft

    return Finish(start, apply)


def two_momenta(lengths: Lengths | None, *, nesterov: bool) -> Finish:
    """Momentum of the preconditioned gradient and of what gives its norm, from `start_step` on the
    first of them.

    Without `lengths` the second is that of the gradient, and norms stay.
    """

    def start(begin: Start) -> tuple[Any, PyTree]:
        trace = {"preconditioned": zeros(begin), "plain": zeros(begin)}
        return trace, start_lengths(lengths, begin)

    def apply(step: Step, tensors: Tensors, trace: Any, graft: PyTree):
        plain = step.tensors
        if lengths is not None:
            plain, graft = updates_of(lengths, step, graft)
            tensors = with_norms(step, tensors, plain)
        # M_S <- momentum M_S + S and M_Q <- momentum M_Q + Q
        both = {"preconditioned": tensors, "plain": plain}
        trace = {kind: traced(step, trace[kind], both[kind]) for kind in both}
        ahead = trace
        if nesterov:
            ahead = {kind: traced(step, trace[kind], both[kind]) for kind in both}
        # both run from the first step, so that the change is no start from zero
        ready = step.count >= step.value("start_step")
        chosen = select(ready, ahead["preconditioned"], ahead["plain"])
        return chosen, trace, graft

    return Finish(start, apply)


def momentum_then_graft(*, graft: bool) -> Finish:
    """Momentum of the preconditioned gradient, with the norms of the leaves of SGD's with the same
    momentum.
    """

    def start(begin: Start) -> tuple[Any, PyTree]:
        trace = {"preconditioned": zeros(begin)}
        if graft:
            trace["sgd"] = zeros(begin)
        return trace, ()

    def apply(step: Step, tensors: Tensors, trace: Any, state: PyTree):
        # M <- momentum M + U and N <- momentum N + G, then M ||N|| / ||M||
        mine = traced(step, trace["preconditioned"], tensors)
        if not graft:
            return mine, {"preconditioned": mine}, state
        plain = traced(step, trace["sgd"], step.tensors)
        trace = {"preconditioned": mine, "sgd": plain}
        return with_norms(step, mine, plain), trace, state

    return Finish(start, apply)


def zeros(begin: Start) -> Tensors:
    """Zeros like the tensors of every group."""
    shapes = {group.name: (group.copies, *group.block) for group in begin.groups}
    return {name: jnp.zeros(shape, begin.dtype) for name, shape in shapes.items()}


def traced(step: Step, trace: Tensors, tensors: Tensors) -> Tensors:
    """`momentum M + U` of every group."""
    m = step.value("momentum")
    return {name: m * x + tensors[name] for name, x in trace.items()}


def start_lengths(lengths: Lengths | None, begin: Start) -> PyTree:
    """State of what gives the norm, in the dtype of the whole."""
    if lengths is None:
        return ()
    wide = _wide(begin.params, begin.dtype)
    return lengths.init(gate.replace_all(begin.params, wide))


def _wide(tree: PyTree, dtype: Any) -> Tensors:
    """Leaves by name in the dtype of the whole."""
    leaves = named_leaves(tree)
    return {name: x.astype(dtype) for name, x in leaves.items()}


def updates_of(
    lengths: Lengths,
    step: Step,
    graft: PyTree,
) -> tuple[Tensors, PyTree]:
    """The update of what gives the norm, from the cleaned gradient, and its new state."""
    # of leaves without entries there is nothing to clean
    clean = _wide(step.updates, step.dtype)
    clean |= gate.scattered(step.groups, step.tensors, step.finite)
    tree = gate.replace_all(step.updates, clean)
    wanted, graft = lengths.update(tree, graft, step.params, **step.extra)
    leaves = _wide(wanted, step.dtype)
    return {group.name: gather(group, leaves) for group in step.groups}, graft


def with_norms(step: Step, tensors: Tensors, wanted: Tensors) -> Tensors:
    """Directions with the norms of another update, leaf by leaf, and of a stacked leaf layer by
    layer.
    """
    out = {}
    for group in step.groups:
        mine = tensors[group.name]
        size = _norms_of_leaves(group, mine)
        length = _norms_of_leaves(group, wanted[group.name])
        # a norm of many large entries overflows; NaN stays
        length = jnp.minimum(length, jnp.finfo(length.dtype).max)
        ratio = length / positive_or_one(size)
        each = ratio.reshape(-1, *[1] * len(group.block))
        out[group.name] = mine * each
    return out


def _norms_of_leaves(group: Group, tensors: jax.Array) -> jax.Array:
    """For every tensor the norm of the leaf that it is a piece of, `[copies]`."""
    sizes = norms(tensors.reshape(group.copies, 1, -1))
    owners, leaves = [], 0
    for view in group.views:
        # the copies of a view come one after another, with all pieces of each
        pieces = math.prod(view.pieces)
        copy = np.repeat(np.arange(view.copies), pieces)
        owners.append(leaves + copy)
        leaves += view.copies
    if leaves == group.copies:
        return sizes
    owner = np.concatenate(owners)
    largest = jax.ops.segment_max(sizes, owner, leaves)[owner]
    # divided by the largest first, so that no square overflows
    unit = positive_or_one(largest)
    shares = jnp.square(sizes / unit)
    squares = jax.ops.segment_sum(shares, owner, leaves)
    return jnp.sqrt(squares)[owner] * unit
