"""Which sites are uses of one layer, and why a parameter belongs to none."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kfac_optax._reasons import COMPLEX, COMPLEX_LAYER, NOT_USED
from kfac_optax._types import Layer, Layers, Uncovered
from kfac_optax.capture.align import aligned, layout_of
from kfac_optax.capture.calls import is_rule
from kfac_optax.capture.geometry import Conv, Dense, Lookup, Unsupported
from kfac_optax.capture.layouts import matrix_shape
from kfac_optax.capture.sites import STOPPED, Analysis, Site


def group(
    analysis: Analysis, names: Sequence[str], leaves: Mapping[str, Any], bypassed: set[int]
) -> tuple[tuple[Site, ...], tuple[int, ...], Layers]:
    """Sites that share a kernel form one layer; everything else about them has to agree.

    Returns:
      The sites as uses of their layers, the layer of each, and the layers.
    """
    groups: dict[int, list[int]] = {}
    problems: dict[int, str] = {}
    tapped = tapped_leaves(analysis)
    for i, site in enumerate(analysis.sites):
        reason = _unfit(site)
        if reason is not None:
            problems |= {o.leaf: reason for o in site.params if o is not None}
        elif (kernel := site.params[0]) is not None:
            groups.setdefault(kernel.leaf, []).append(i)
    sites = list(analysis.sites)
    biased = {site.bias for site in sites}
    groups = {
        leaf: members
        for leaf, members in groups.items()
        if leaf not in biased or not all(sites[i].found for i in members)
    }
    for leaf, members in groups.items():
        groups[leaf], problem = _fitting(members, sites, leaves[names[leaf]])
        if problem is not None:
            problems.setdefault(leaf, problem)
    used = (i for i, name in enumerate(names) if i in tapped or analysis.consumers.get(i))
    problems |= {
        i: COMPLEX for i in used if jnp.issubdtype(leaves[names[i]].dtype, jnp.complexfloating)
    }
    groups = {leaf: members for leaf, members in groups.items() if leaf not in problems}
    biases = _own_biases(groups, sites, problems)
    owner = [-1] * len(sites)
    layers = []
    for index, (leaf, members) in enumerate(groups.items()):
        for i in members:
            owner[i] = index
        bias = biases.get(leaf)
        mine = [sites[i] for i in members]
        unseen = _unseen(leaf, bias, mine, names, analysis.consumers)
        partly = [Uncovered(name, tuple(leaves[name].shape), note) for name, note in unseen]
        layers.append(_layer(mine, names[leaf], None if bias is None else names[bias], partly))
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
    return tuple(sites), tuple(owner), Layers(tuple(layers), uncovered)


def _layer(
    sites: Sequence[Site], kernel: str, bias: str | None, partly: Sequence[Uncovered]
) -> Layer:
    # a look-up comes before a head that shares its table, and a use before one the other way round
    first = min(sites, key=lambda site: (not isinstance(site.geometry, Lookup), site.swapped))
    kinds = {site.geometry.kind for site in sites}
    groups, inputs, outputs = matrix_shape(first.geometry, first.kernel)
    mixed = bias is not None and any(site.bias is None for site in sites)
    swapped = any(site.swapped for site in sites)
    channels = 0
    if isinstance(first.geometry, Conv) and not mixed:
        channels = first.geometry.plain_channels(first.kernel)
    uses = [math.prod(site.loops) for site in sites]
    rows = sum(n * math.prod(site.row_shape) for n, site in zip(uses, sites, strict=True))
    return Layer(
        path=kernel.rpartition("/")[0] or kernel,
        kind="tied_embedding" if len(kinds & {"embedding", "dense"}) > 1 else first.geometry.kind,
        kernel=kernel,
        bias=bias,
        inputs=inputs,
        outputs=outputs,
        layout=layout_of(first),
        stack=first.stack,
        groups=groups,
        channels=channels,
        uses=sum(uses),
        rows=rows,
        notes=tuple(u.reason for u in partly),
        partly=tuple(partly),
        mixed=mixed,
        swapped=swapped,
    )


def tapped_leaves(analysis: Analysis) -> set[int]:
    """Parameters that are operands of a tap."""
    return {origin.leaf for site in analysis.sites for origin in site.params if origin is not None}


def _unfit(site: Site) -> str | None:
    """Why no layer can have this site."""
    if isinstance(site.geometry, Unsupported):
        return f"not supported: {site.geometry.reason}"
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (site.a, site.s)):
        return COMPLEX_LAYER
    return None


def _fitting(members: Sequence[int], sites: list[Site], leaf: Any) -> tuple[list[int], str | None]:
    """The uses of a kernel that are those of one layer, and what is wrong with it.

    Taps have to agree; what was found in the program is left out where it does not fit them.
    """
    taps = [i for i in members if not sites[i].found]
    lead = sites[(taps or [i for i in members if sites[i].bias is not None] or members)[0]]
    kept = []
    for i in members:
        site = aligned(sites[i], lead) if sites[i].found else sites[i]
        if site is None or (site.found and taps and _misfit(site, leaf) is not None):
            continue
        # a bias belongs to the layer's outputs
        sites[i] = site._replace(params=site.params[:1]) if site.swapped else site
        kept.append(i)
    for i in kept:
        if (reason := _misfit(sites[i], leaf)) is not None:
            return kept, reason
    alike = _alike([sites[i] for i in taps])
    return kept, None if alike else "layers of different kinds share it"


def _alike(sites: Sequence[Site]) -> bool:
    """Whether uses of one kernel see the same matrix in it: of one kind, or an embedding that is
    also the head.
    """
    if not sites:
        return True
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
        and layout_of(site) == layout_of(first)
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
    """The bias of each kernel, where all uses that have one agree on it and no other kernel uses
    it.
    """
    wanted: dict[int, set[int | None]] = {}
    for kernel, members in groups.items():
        for i in members:
            wanted.setdefault(kernel, set()).add(sites[i].bias)
    users: dict[int, set[int]] = {}
    for kernel, biases in wanted.items():
        for bias in biases - {None}:
            users.setdefault(bias, set()).add(kernel)  # type: ignore[arg-type]
    own = {}
    for kernel, biases in wanted.items():
        named = biases - {None}
        if len(named) == 1 and len(users[bias := next(iter(named))]) == 1:  # type: ignore[index]
            own[kernel] = bias
        for bias in named:
            if own.get(kernel) != bias:
                problems[bias] = "kernel and bias are shared by different layers"  # type: ignore[index]
    return own  # type: ignore[return-value]


def _unseen(
    kernel: int,
    bias: int | None,
    sites: Sequence[Site],
    names: Sequence[str],
    consumers: Mapping[int, Sequence[str]],
) -> list[tuple[str, str]]:
    """Parameters of a layer with uses that its statistics do not see, and which."""
    notes = [(names[kernel], _other_uses(names[kernel], consumers.get(kernel, []), sites))]
    if bias is not None:
        # named by the equation that reads it
        mine = [site._replace(name="add") for site in sites if site.bias == bias]
        notes.append((names[bias], _other_uses(names[bias], consumers.get(bias, []), mine)))
    return [(name, note) for name, note in notes if note]


def _other_uses(name: str, consumers: Sequence[str], sites: Sequence[Site]) -> str:
    """A layer consumes each of its parameters once for every tap, and once for every use that was
    found, named by its equation; anything more the statistics do not see.
    """
    used = [x for x in consumers if x != STOPPED]
    for site in sites:
        if site.found and site.name in used:
            used.remove(site.name)
    taps = sum(not site.found for site in sites)
    plain, rules = [x for x in used if not is_rule(x)], [x for x in used if is_rule(x)]
    leaf, extra = name.rpartition("/")[2], plain[taps:] + rules
    if rules and len(plain) < taps:  # what a tap sees the output of
        return f"{leaf} used through {_listed(rules)}: its own derivative rule, not measured"
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
