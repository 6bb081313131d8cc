"""The end of a step: the norm of another transformation, and momentum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfac_optax._tree import named_leaves
from kfac_optax._types import PyTree
from kfac_optax._validate import check_choice
from kfac_optax.methods.gradient import gate
from kfac_optax.methods.gradient.axes import gather
from kfac_optax.methods.gradient.axiswise import Start, Step
from kfac_optax.step_rules.graft import exchange_norms

Tensors = dict[str, jax.Array]  # by group
Lengths = optax.GradientTransformationExtraArgs

GRAFTS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "adam": optax.scale_by_adam,
    "rms": optax.scale_by_rms,
}


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
        check_choice(where, "graft", graft, GRAFTS)
        graft = GRAFTS[graft]()
    return optax.with_extra_args_support(graft)


def graft_then_momentum(
    lengths: Lengths | None, *, momentum: bool, nesterov: bool = False
) -> Finish:
    """Norms of `lengths`, then `M <- momentum M + U`; with `nesterov` the update is
    `momentum M + U`.
    """

    def start(begin: Start) -> tuple[Any, PyTree]:
        return zeros(begin) if momentum else (), start_lengths(lengths, begin)

    def apply(step: Step, tensors: Tensors, trace: Any, graft: PyTree):
        if lengths is not None:
            wanted, graft = updates_of(lengths, step, graft)
            tensors = with_norms(step, tensors, wanted)
        if not momentum:
            return tensors, trace, graft
        trace = traced(step, trace, tensors)
        return traced(step, trace, tensors) if nesterov else trace, trace, graft

    return Finish(start, apply)


def zeros(begin: Start) -> Tensors:
    """Zeros like the tensors of every group."""
    return {g.name: jnp.zeros((g.copies, *g.block), begin.dtype) for g in begin.groups}


def traced(step: Step, trace: Tensors, tensors: Tensors) -> Tensors:
    """`momentum M + U` of every group."""
    m = step.value("momentum")
    return {name: m * x + tensors[name] for name, x in trace.items()}


def start_lengths(lengths: Lengths | None, begin: Start) -> PyTree:
    """State of what gives the norm, in the dtype of the whole."""
    if lengths is None:
        return ()
    wide = {n: x.astype(begin.dtype) for n, x in named_leaves(begin.params).items()}
    return lengths.init(gate.replace_all(begin.params, wide))


def updates_of(lengths: Lengths, step: Step, graft: PyTree) -> tuple[PyTree, PyTree]:
    """The update of what gives the norm, from the cleaned gradient, and its new state."""
    # of leaves without entries there is nothing to clean
    clean = {n: x.astype(step.dtype) for n, x in named_leaves(step.updates).items()}
    clean |= gate.scattered(step.groups, step.tensors)
    tree = gate.replace_all(step.updates, clean)
    return lengths.update(tree, graft, step.params, **step.extra)


def with_norms(step: Step, tensors: Tensors, wanted: PyTree) -> Tensors:
    """Directions with the norms of the leaves of another update."""
    direction = gate.scattered(step.groups, tensors)
    grafted = named_leaves(exchange_norms(direction, named_leaves(wanted)))
    return {group.name: gather(group, grafted) for group in step.groups}
