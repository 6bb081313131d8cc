"""What to measure, and where in a traced model it is found."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from kfac_optax._types import Block, Coupling, Layer, Layers, Near, PyTree, Travel, Use
from kfac_optax.capture.layers import Traced
from kfac_optax.capture.sites import Site
from kfac_optax.estimators.owned import Owners
from kfac_optax.estimators.reductions import names_of
from kfac_optax.estimators.served_heads import Served


class Plan(NamedTuple):
    """What to measure.

    Attributes:
      layers: the layers, by their owner's tree (a subset of the model's).
      blocks: the block that measures each of them.
      coupling: measures across layers, or `None`.
      dtype: dtype of the statistics.
      axis_name: mapped axis over which the batch is split, or `None`.
      count: number of the step: random signs change with it.
      inverses: what is held for each of the layers, `[copies, ...]`, where its block measures in
        it; `None` for other layers, `()` where no block does.
      travel: in which form statistics are sent where `axis_name` is given.
      apart: axes of `axis_name` over which no means are taken: statistics stay those of each
        device's part of the batch there.
      owners: for each of the layers the devices that measure it, `None` for all; `()` where all
        measure everything.
      near: for each of the layers Kronecker factors that all devices have, with `travel.bits`;
        `None` for other layers, `()` where there are none.
    """

    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    coupling: Coupling | None
    dtype: Any
    axis_name: Any = None
    count: Any = 0
    inverses: tuple[PyTree, ...] = ()
    travel: Travel = Travel()
    apart: tuple[str, ...] = ()
    owners: tuple[Owners | None, ...] = ()
    near: tuple[Near | None, ...] = ()

    @property
    def averaged_over(self) -> tuple[Any, ...]:
        """The axes over which means are taken."""
        return tuple(name for name in names_of(self.axis_name) if name not in self.apart)

    def inverse(self, i: int) -> PyTree:
        """What the block of layer `i` measures in, `[copies, ...]`, or `None`.

        Raises:
          ValueError: it is missing.
        """
        if not self.blocks[i].reads_inverse:
            return None
        inverse = self.inverses[i] if self.inverses else None
        if inverse is None:
            raise ValueError(
                f"layer {self.layers[i].path!r}: block {self.blocks[i].name!r} measures in what is "
                "held for the layer, but the plan has no inverse for it. Expected "
                "`inverses=` with one entry for every layer: what `factorize` made, for each copy."
            )
        return inverse


def of_first_moments(
    layers: Sequence[Layer],
    blocks: Sequence[Block],
    coupling: Coupling | None,
    where: str,
) -> bool:
    """Whether the blocks average output gradients themselves, in place of their products.

    One pass gives one or the other, since it has random signs or has not.

    Raises:
      ValueError: some do and some do not, or a coupling asks for products.
    """
    # one sort needs gradients as they are, the other random signs of the terms
    wanted = [block.first_moments for block in blocks]
    if not any(wanted):
        return False
    averaging = {block.name for block in blocks if block.first_moments}
    names = ", ".join(sorted(averaging))
    others = [
        f"{layer.path or '(root)'} ({block.name})"
        for layer, block in zip(layers, blocks, strict=True)
        if not block.first_moments
    ]
    if coupling is not None:
        others.append(f"the coupling ({coupling.name})")
    if others:
        raise ValueError(
            f"{where}: {names} averages output gradients themselves, but {', '.join(others)} their "
            "products; expected one sort in a transformation. Give every layer such a block, "
            "block=lambda layer: rank_one(), with normalization='pass', uncovered='pass' and no "
            "coupling, as the preset eva does; or use one transformation for each sort, by "
            "optax.partition."
        )
    return True


class Setting(NamedTuple):
    """The model and batch that a plan is carried out on."""

    sites: tuple[Site, ...]
    owner: tuple[int | None, ...]  # position of each site's layer in the plan
    found: dict[int, Layer]  # the layers as this trace found them, by position in the plan
    examples: int
    weights: jax.Array | None
    served: tuple[Served, ...] = ()  # of each site; none where only the owners are asked for

    def uses(self, i: int) -> int:
        """How often layer `i` of the plan runs in this trace."""
        return self.found[i].uses

    def layer(self, plan: Plan, i: int) -> Layer:
        """Layer `i` of the plan, with what this trace says about its uses."""
        # what differs between traces of one model: whether uses differ
        found = self.found[i]
        return dataclasses.replace(plan.layers[i], mixed=found.mixed, swapped=found.swapped)

    def use(self, plan: Plan, index: int) -> Use:
        """What a block has to know of the use at a site, without weights.

        The batch is that of the head that the site serves, so that every statistic is a mean over
        the examples of its head, and that of a layer their sum over heads.
        """
        i = self.owner[index]
        assert i is not None
        layer = plan.layers[i]
        head, examples = self.served[index]
        if self.found[i].given_rows and layer.bias is not None:
            # the rows have its coordinate in them
            layer = dataclasses.replace(layer, bias=None, inputs=layer.inputs + 1)
        rows = self._rows(i)
        if examples != self.examples:  # a whole number otherwise
            rows = rows * examples / self.examples
        return Use(layer, examples, rows, plan.dtype, head=head)

    def _rows(self, i: int) -> float:
        """Rows of a layer if all heads had as many examples as the first."""
        # the usual case: one batch for all heads
        if all(served.examples == self.examples for served in self.served):
            return self.found[i].rows
        total = 0
        for site, owner, served in zip(self.sites, self.owner, self.served, strict=True):
            if owner == i:
                rows = math.prod((*site.loops, *site.row_shape))
                total += rows * self.examples / served.examples
        return total

    def share(self, index: int) -> float:
        """Examples of the head that a site serves, for one of the first head.

        Cotangents carry its inverse (its root where products are measured): all heads are divided
        by the number of examples of the first.
        """
        return self.served[index].examples / self.examples


def set_up(
    plan: Plan,
    traced: Traced,
    examples: int,
    weights: Any,
    where: str,
    served: Sequence[Served] = (),
) -> Setting:
    """Finds the layers of a plan in a traced model.

    Raises:
      ValueError: one is missing or has another shape.
    """
    # a parameter on its own has no rows, and so no site
    with_sites = [i for i, layer in enumerate(plan.layers) if layer.kind != "diagonal"]
    wanted = [plan.layers[i] for i in with_sites]
    matched = match_layers(wanted, traced.layers, where)
    # from positions among the traced layers to positions in the plan
    position = dict(zip(matched, with_sites, strict=True))
    owner = tuple(position.get(i) for i in traced.owner)
    found = {i: traced.layers.layers[j] for j, i in position.items()}
    return Setting(traced.sites, owner, found, examples, weights, tuple(served))


def match_layers(
    wanted: Sequence[Layer],
    found: Layers,
    where: str,
) -> list[int]:
    """Positions of the wanted layers among those of the traced model.

    Raises:
      ValueError: a layer is missing or has another shape, so the curvature belongs to another
        model.
    """
    positions = {(layer.kernel, layer.part): i for i, layer in enumerate(found.layers)}
    result = []
    for layer in wanted:
        key = layer.kernel, layer.part
        if key not in positions:
            raise ValueError(
                f"{where}: `curvature` has no layer {layer.path!r}; it has "
                f"{', '.join(x.path for x in found.layers)}. It was made for another model or "
                "parameter tree than `layers`: use the same estimator for both."
            )
        other = found.layers[positions[key]]
        # the same parameter with another shape is another model
        mine = (*layer.stack, layer.inputs, layer.outputs)
        theirs = (*other.stack, other.inputs, other.outputs)
        biases = (layer.bias, layer.bias_part), (other.bias, other.bias_part)
        other_bias = layer.bias is not None and biases[0] != biases[1]
        if mine != theirs or other_bias:
            raise ValueError(
                f"{where}: layer {layer.path!r} has shape "
                f"{mine}{' with bias' if layer.bias else ''} in `layers` but {theirs}"
                f"{' with bias' if other.bias else ''} in `curvature`. Make `layers` again for "
                "this model: layers = fisher.layers(params, *args)."
            )
        result.append(positions[key])
    return result
