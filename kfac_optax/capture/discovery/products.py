"""Products with a parameter: which of its axes batch, are summed over, and are outputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kfac_optax.capture.geometry import Contraction
from kfac_optax.capture.jaxpr.example_axis import axes_of_product
from kfac_optax.capture.jaxpr.views import View


class Roles(NamedTuple):
    """Axes of the parameter's operand in a product, and those of the other operand beside them.

    Attributes:
      groups, inputs, outputs: of the parameter's operand, in the order in which they are stored.
      rows: from axes of the other operand to axes of the product.
      theirs: from axes of the parameter's operand to axes of the other.
      own: from axes of the parameter's operand to axes of the product.
    """

    groups: list[int]
    inputs: list[int]
    outputs: list[int]
    rows: dict[int, int]
    theirs: dict[int, int]
    own: dict[int, int]

    @property
    def features(self) -> tuple[int, ...]:
        """Axes of the product that are groups and outputs of the layer."""
        return tuple(self.own[i] for i in self.groups + self.outputs)


def roles_in_product(eqn: Any, operand: int, view: View) -> Roles | None:
    """Roles of the axes of a parameter in a `dot_general`, `None` where it is repeated along one
    that is no row.
    """
    summed, batched = eqn.params["dimension_numbers"]
    there = 1 - operand
    in_product = axes_of_product(eqn)
    mine, other = in_product[operand], in_product[there]
    # axes of the operand: summed over, batched, free
    contracting = list(summed[operand])
    batch = list(batched[operand])
    sizes = eqn.invars[operand].aval.shape
    free = [i for i in range(len(sizes)) if i not in contracting + batch]
    # the same parameter for several columns is no matrix of its own
    for i in contracting + free:
        if view.axes[i] is None and sizes[i] > 1:
            return None
    # axes of the other side that meet mine
    theirs = dict(zip(contracting, summed[there], strict=True))
    theirs |= dict(zip(batch, batched[there], strict=True))
    rows = {axis: i for axis, i in other.items() if axis not in batched[there]}
    # a parameter repeated along a batched axis is the same one in every row
    repeated = [i for i in batch if view.axes[i] is None]
    rows |= {theirs[i]: mine[i] for i in repeated}

    # in the order of storage, so that equal layers share a layout
    def place(i: int) -> int:
        axis = view.axes[i]
        return len(view.stored) if axis is None else axis

    own = [i for i in batch if i not in repeated]
    return Roles(
        groups=sorted(own, key=place),
        inputs=sorted(contracting, key=place),
        outputs=sorted(free, key=place),
        rows=rows,
        theirs=theirs,
        own=mine,
    )


def contraction_of(
    eqn: Any,
    operand: int,
    view: View,
    roles: Roles,
    examples: Sequence[int],
) -> Contraction:
    """The product as a layer whose kernel is the parameter as stored."""

    # of the operand's axes those of the parameter, role by role
    def of_parameter(axes: Sequence[int]) -> list[int]:
        stored = [view.axes[i] for i in axes]
        return [axis for axis in stored if axis is not None]

    groups = of_parameter(roles.groups)
    inputs = of_parameter(roles.inputs)
    outputs = of_parameter(roles.outputs)
    # of length one, wherever they are
    inputs += [i for i in range(len(view.stored)) if i not in view.axes]
    kernel = [*groups, *inputs, *outputs]
    # from axes of the product to those of the other operand
    in_product = {i: axis for axis, i in roles.rows.items()}
    rows = examples_first(sorted(in_product), examples)
    # a [*rows, *groups, *inputs], s [*rows, *groups, *outputs]
    features = [roles.theirs[i] for i in roles.groups + roles.inputs]
    a = [*(in_product[i] for i in rows), *features]
    s = [*rows, *roles.features]
    # one axis each is a dense layer, whatever it was written as
    single = not roles.groups and len(inputs) <= 1 and len(outputs) <= 1
    return Contraction(
        a=from_end(a, eqn.invars[1 - operand].aval.ndim),
        s=from_end(s, eqn.outvars[0].aval.ndim),
        kernel=from_end(kernel, len(view.stored)),
        rows=len(rows),
        groups=len(roles.groups),
        inputs=len(inputs),
        outputs=len(outputs),
        kind="dense" if single else "einsum",
    )


def examples_first(rows: Sequence[int], examples: Sequence[int]) -> list[int]:
    """Axes in order, but that of the examples in front."""
    # examples in front, positions behind
    first = [axis for axis in examples if axis in rows][:1]
    return first + [axis for axis in rows if axis not in first]


def from_end(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Axes counted from the end."""
    return tuple(int(axis) - rank for axis in axes)
