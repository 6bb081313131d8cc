"""From tapped sites to layers: which parameters belong together, and what is left uncovered."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import partial_eval

from kfac_optax._tree import named_leaves
from kfac_optax._types import (
    COMPLEX,
    COMPLEX_LAYER,
    NOT_USED,
    Layer,
    Layers,
    Layout,
    PyTree,
    Uncovered,
)
from kfac_optax.capture import linen, nnx
from kfac_optax.capture.geometry import Conv, Dense, Lookup, Unsupported, layout, matrix_shape
from kfac_optax.capture.row_axes import without_examples
from kfac_optax.capture.sites import STOPPED, Analysis, Site, analyse, count_taps, is_rule
from kfac_optax.capture.tap import tapping

RANDOM_SIGNS = "rows shared by the examples: measured with random signs"


class Traced(NamedTuple):
    """A function traced with taps.

    Attributes:
      names: paths of the parameters, in order.
      jaxpr: closed jaxpr; inputs are the leaves of params, then those of the other arguments.
      out_shape: abstract result of the function.
      sites: taps that belong to a layer, or to none (`owner` -1), in order of execution.
      owner: index of the layer of each site.
      layers: the coverage.
    """

    names: tuple[str, ...]
    jaxpr: Any
    out_shape: PyTree
    sites: tuple[Site, ...]
    owner: tuple[int, ...]
    layers: Layers


def trace(
    function: Callable[..., PyTree],
    params: PyTree,
    args: Sequence[PyTree],
    where: str,
    check: Callable[[PyTree], Any] = lambda out_shape: None,
) -> Traced:
    """Traces `function(params, *args)` with all front ends on and finds its layers; `check` sees
    its abstract result.

    Raises:
      ValueError: no tapped layer was found, or one runs where it has no meaning.
    """
    with tapping(), linen.intercepting(), nnx.intercepting():
        jaxpr, out_shape = jax.make_jaxpr(function, return_shape=True)(params, *args)
    check(out_shape)
    leaves = named_leaves(params)
    names = tuple(leaves)
    if len(names) != len(jax.tree.leaves(params)):
        raise ValueError(
            f"{where}: two parameters have the same path once normalised: {sorted(names)}."
        )
    bypassed = _tapped(analyse(jaxpr.jaxpr, len(names)))
    # What the prediction does not depend on would be measured as zero, and a layer may be there for
    # a derivative only.
    jaxpr = _live(jaxpr)
    analysis = analyse(jaxpr.jaxpr, len(names))
    bypassed -= _tapped(analysis)
    if not (
        analysis.sites
        or bypassed
        or any(map(is_rule, itertools.chain(*analysis.consumers.values())))
    ):
        raise ValueError(
            f"{where}: no layer found in {getattr(function, '__name__', function)!r}, traced with "
            f"parameters {', '.join(names[:5])}{', …' if len(names) > 5 else ''}. Supported: "
            f"{', '.join(linen.SUPPORTED + nnx.SUPPORTED)}; anything else by hand: `s = "
            "kfac_optax.tap_dense(x @ kernel + bias, x, kernel, bias)`, `tap_conv`, "
            "`tap_embedding`, `tap_scale_shift`."
        )
    owner, layers = _group(analysis, names, leaves, bypassed)
    if not layers.layers:
        reasons = "; ".join(f"{u.path or '(root)'} {u.shape}: {u.reason}" for u in layers.uncovered)
        raise ValueError(
            f"{where}: no layer left that can be measured. Expected at least one tapped layer "
            "whose output reaches the prediction and whose kernel is a parameter as stored "
            f"([inputs, outputs] or its transpose). {reasons}."
        )
    return Traced(names, jaxpr, out_shape, analysis.sites, owner, layers)


def _live(closed: Any, outputs: Sequence[bool] | None = None) -> Any:
    """The same closed jaxpr without equations on which none of these outputs (default all) depends."""
    outputs = [True] * len(closed.jaxpr.outvars) if outputs is None else outputs
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, list(outputs), instantiate=True)
    return jex.ClosedJaxpr(jaxpr, closed.consts)


def serve_all(traced: Traced, part: Callable[[PyTree], PyTree]) -> bool:
    """Whether that part of the function's result depends on every tap that was found."""
    leaves, treedef = jax.tree.flatten(traced.out_shape)
    wanted = set(jax.tree.leaves(part(treedef.unflatten(range(len(leaves))))))
    pruned = _live(traced.jaxpr, [i in wanted for i in range(len(leaves))])
    return count_taps(pruned.jaxpr) == len(traced.sites)


def _tapped(analysis: Analysis) -> set[int]:
    return {origin.leaf for site in analysis.sites for origin in site.params if origin is not None}


def with_examples(traced: Traced, examples: int, signs: bool) -> Traced:
    """The same model, its layers told whether their rows are those of `examples` examples.

    Axis 0 has to be as long as the batch, and the input has to depend on the arguments of the
    model: a table of as many positions as there are examples does not. Positions that are
    themselves passed as an argument, as many as there are examples, cannot be told apart from a
    batch; nor can constants in a model that closes over its batch.

    Args:
      traced: the model.
      examples: N.
      signs: the estimator tells the examples apart by random signs where they share rows, which the
        table then says.
    """
    layers = []
    for index, layer in enumerate(traced.layers.layers):
        mine = [
            site for site, owner in zip(traced.sites, traced.owner, strict=True) if owner == index
        ]
        own = _per_example(mine, examples)
        drawn = signs and not own and any(without_examples(site, examples) for site in mine)
        notes = (*layer.notes, RANDOM_SIGNS) if drawn else layer.notes
        layers.append(dataclasses.replace(layer, per_example=own, notes=notes))
    return traced._replace(layers=dataclasses.replace(traced.layers, layers=tuple(layers)))


def _per_example(sites: Sequence[Site], examples: int) -> bool:
    # an unrolled recurrent layer starts from a state that is the same for every batch
    tables = [site for site in sites if isinstance(site.geometry, Lookup)]
    flows = any(site.varies for site in sites) and all(site.varies for site in tables)
    return flows and all(site.row_shape[:1] == (examples,) for site in sites)


def _group(
    analysis: Analysis, names: Sequence[str], leaves: Mapping[str, Any], bypassed: set[int]
) -> tuple[tuple[int, ...], Layers]:
    """Sites that share a kernel form one layer; everything else about them has to agree."""
    groups: dict[int, list[int]] = {}
    problems: dict[int, str] = {}
    tapped = _tapped(analysis)
    for i, site in enumerate(analysis.sites):
        if isinstance(site.geometry, Unsupported):
            problems |= {
                o.leaf: f"not supported: {site.geometry.reason}"
                for o in site.params
                if o is not None
            }
            continue
        if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (site.a, site.s)):
            problems |= {o.leaf: COMPLEX_LAYER for o in site.params if o is not None}
            continue
        kernel = site.params[0]
        if kernel is None:
            continue
        if (reason := _misfit(site, leaves[names[kernel.leaf]])) is not None:
            problems[kernel.leaf] = reason
        groups.setdefault(kernel.leaf, []).append(i)
    for leaf, members in groups.items():
        if not _alike([analysis.sites[i] for i in members]):
            problems.setdefault(leaf, "layers of different kinds share it")
    used = (i for i, name in enumerate(names) if i in tapped or analysis.consumers.get(i))
    problems |= {
        i: COMPLEX for i in used if jnp.issubdtype(leaves[names[i]].dtype, jnp.complexfloating)
    }
    groups = {leaf: members for leaf, members in groups.items() if leaf not in problems}
    biases = _own_biases(groups, analysis.sites, problems)
    owner = [-1] * len(analysis.sites)
    layers = []
    for index, (leaf, members) in enumerate(groups.items()):
        for i in members:
            owner[i] = index
        bias = biases.get(leaf)
        covered = [leaf] if bias is None else [leaf, bias]
        others = (
            (names[x], _other_uses(names[x], analysis.consumers.get(x, []), len(members)))
            for x in covered
        )
        partly = [Uncovered(name, tuple(leaves[name].shape), note) for name, note in others if note]
        layers.append(
            _layer(
                [analysis.sites[i] for i in members],
                names[leaf],
                None if bias is None else names[bias],
                partly,
            )
        )
    layers = _distinct(layers)
    taken = {names[leaf] for leaf in groups} | {names[b] for b in biases.values()}
    problems = _bypasses(bypassed, analysis) | problems
    uncovered = tuple(
        Uncovered(
            name,
            tuple(leaves[name].shape),
            _reason(i, problems, tapped, analysis.consumers.get(i, [])),
        )
        for i, name in enumerate(names)
        if name not in taken
    )
    return tuple(owner), Layers(tuple(layers), uncovered)


def _layer(
    sites: Sequence[Site], kernel: str, bias: str | None, partly: Sequence[Uncovered]
) -> Layer:
    # a look-up comes before a head that shares its table
    first = min(sites, key=lambda site: not isinstance(site.geometry, Lookup))
    kinds = {site.geometry.kind for site in sites}
    groups, inputs, outputs = matrix_shape(first.geometry, first.kernel)
    uses = [math.prod(site.loops) for site in sites]
    rows = sum(n * math.prod(site.row_shape) for n, site in zip(uses, sites, strict=True))
    return Layer(
        path=kernel.rpartition("/")[0] or kernel,
        kind="tied_embedding" if len(kinds) > 1 else first.geometry.kind,
        kernel=kernel,
        bias=bias,
        inputs=inputs,
        outputs=outputs,
        layout=_layout(first),
        stack=first.stack,
        groups=groups,
        channels=first.geometry.plain_channels(first.kernel)
        if isinstance(first.geometry, Conv)
        else 0,
        uses=sum(uses),
        rows=rows,
        notes=tuple(u.reason for u in partly),
        partly=tuple(partly),
    )


def _layout(site: Site) -> Layout:
    origin = site.params[0]
    assert origin is not None
    return layout(site.geometry, site.kernel, origin.permutation)


def _alike(sites: Sequence[Site]) -> bool:
    """Whether uses of one kernel see the same matrix in it: of one kind, or an embedding that is
    also the head.
    """
    kinds = {site.geometry.kind for site in sites}
    if kinds == {"embedding", "dense"}:
        heads = [site for site in sites if isinstance(site.geometry, Dense)]
        return all(
            site.params[0] is not None and site.params[0].permutation == (-1, -2) for site in heads
        )
    first = sites[0]
    return all(
        site.geometry.kind == first.geometry.kind
        and matrix_shape(site.geometry, site.kernel) == matrix_shape(first.geometry, first.kernel)
        and _layout(site) == _layout(first)
        for site in sites
    )


def _distinct(layers: Sequence[Layer]) -> list[Layer]:
    """Layers of one module with several kernels are told apart by the kernel; paths name rows in
    the state.
    """
    count = collections.Counter(layer.path for layer in layers)
    return [
        layer if count[layer.path] == 1 else dataclasses.replace(layer, path=layer.kernel)
        for layer in layers
    ]


def _misfit(site: Site, leaf: Any) -> str | None:
    """Why the kernel operand of a site is not the parameter as stored, if it is not."""
    origin = site.params[0]
    assert origin is not None
    moved = len(origin.permutation)
    if moved > len(site.kernel):
        return "the axes of its stack are not in front"
    used = (*site.kernel[: len(site.kernel) - moved], *(0,) * moved)
    stored = list(used)
    for i, axis in enumerate(origin.permutation):
        stored[axis] = site.kernel[len(site.kernel) - moved + i]
    if tuple(leaf.shape) != (*site.stack, *stored):
        return f"its layer uses a part of it: {tuple(leaf.shape)} stored, {(*site.stack, *stored)} used"
    return None


def _own_biases(
    groups: Mapping[int, Sequence[int]], sites: Sequence[Site], problems: dict[int, str]
) -> dict[int, int]:
    """The bias of each kernel, where all uses of the kernel agree on it and no other kernel uses
    it.
    """
    wanted: dict[int, set[int | None]] = {}
    for kernel, members in groups.items():
        for i in members:
            operands = sites[i].params
            origin = operands[1] if len(operands) > 1 else None
            wanted.setdefault(kernel, set()).add(None if origin is None else origin.leaf)
    users: dict[int, set[int]] = {}
    for kernel, biases in wanted.items():
        for bias in biases - {None}:
            users.setdefault(bias, set()).add(kernel)  # type: ignore[arg-type]
    own = {}
    for kernel, biases in wanted.items():
        named = biases - {None}
        if len(biases) == 1 and named and len(users[bias := next(iter(named))]) == 1:  # type: ignore[index]
            own[kernel] = bias
        for bias in named:
            if own.get(kernel) != bias:
                problems[bias] = "kernel and bias are shared by different layers"  # type: ignore[index]
    return own  # type: ignore[return-value]


def _other_uses(name: str, consumers: Sequence[str], taps: int) -> str:
    """A layer consumes each of its parameters once for every tap; anything more the statistics do
    not see.

    So it is of a derivative of the layer in its input, a product with the same kernel.
    """
    used = [x for x in consumers if x != STOPPED]
    leaf, own, extra = name.rpartition("/")[2], [x for x in used[:taps] if is_rule(x)], used[taps:]
    if own:
        return f"{leaf} used through {_listed(own)}: its own derivative rule, not measured"
    return f"{leaf} also used by {_listed(extra)}: not measured" if extra else ""


def _bypasses(leaves: set[int], analysis: Analysis) -> dict[int, str]:
    """Reasons of parameters whose layers have no part in the prediction, but which are used
    otherwise.
    """
    used = {i: [x for x in analysis.consumers.get(i, []) if x != STOPPED] for i in leaves}
    return {
        i: f"only used by {_listed(consumers)}, not by the output of its layer: a derivative of it is not measured"
        for i, consumers in used.items()
        if consumers
    }


def _reason(
    index: int, problems: Mapping[int, str], tapped: set[int], consumers: Sequence[str]
) -> str:
    if index in problems:
        return problems[index]
    if index in tapped:
        return "the kernel of its layer is not a parameter as stored"
    if not consumers:
        return NOT_USED
    used = [x for x in consumers if x != STOPPED]
    if not used:
        return f"only used behind {STOPPED}"
    if all(map(is_rule, used)):
        return f"inside {_listed(used)}: its own derivative rule"
    return f"used by {_listed(used)} outside any supported layer"


def _listed(consumers: Sequence[str]) -> str:
    return ", ".join(sorted(set(consumers)))
