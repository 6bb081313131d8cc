"""Which sites are uses of one layer, and why a parameter belongs to none."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kfac_optax._reasons import COMPLEX, COMPLEX_LAYER, NOT_REAL
from kfac_optax._types import Layer, Layers, Uncovered
from kfac_optax.capture.align import aligned, layout_of
from kfac_optax.capture.code_lines import listed
from kfac_optax.capture.explain import bypasses, reason, unseen, uses_by_leaf
from kfac_optax.capture.geometry import Conv, Dense, Lookup, ScaleShift, Unsupported
from kfac_optax.capture.layouts import matrix_shape
from kfac_optax.capture.ownership import Key, apart, own_biases
from kfac_optax.capture.sites import Analysis, Site


def group(
    analysis: Analysis,
    names: Sequence[str],
    leaves: Mapping[str, Any],
    bypassed: set[int],
) -> tuple[tuple[Site, ...], tuple[int, ...], Layers]:
    """Sites that share a kernel, or the same part of one, form one layer; everything else about
    them has to agree.

    Returns:
      The sites as uses of their layers, the layer of each, and the layers.
    """
    # why a parameter has no layer, by its number
    problems: dict[int, str] = {}
    sites = list(analysis.sites)
    groups = _by_kernel(sites, problems)
    # uses that see the kernel as the others do
    for key, members in groups.items():
        groups[key], problem = _fitting(members, sites, leaves[names[key[0]]])
        if problem is not None:
            problems.setdefault(key[0], problem)
    # reasons are given only where the model uses the parameter
    tapped = tapped_leaves(analysis)
    used = (i for i, name in enumerate(names) if i in tapped or analysis.consumers.get(i))
    problems |= _not_of_reals({i: leaves[names[i]].dtype for i in used})
    groups = {key: members for key, members in groups.items() if key[0] not in problems}
    # a scale gives way to a kernel that has the same numbers
    groups = apart(groups, {key: _is_scale(sites[groups[key][0]]) for key in groups})
    biases = _biases(groups, sites, problems)
    owner = [-1] * len(sites)
    # -1: a site of no layer
    for index, members in enumerate(groups.values()):
        for i in members:
            owner[i] = index
    uses = uses_by_leaf(s for s, index in zip(sites, owner, strict=True) if index >= 0)
    layers = []
    for key, members in groups.items():
        bias = biases.get(key)
        # the kernel and, where it has one, the bias
        mine = [leaf for leaf, _ in (key, *([] if bias is None else [bias]))]
        notes = unseen(mine, uses, names, analysis.consumers)
        partly = [
            Uncovered(name, tuple(leaves[name].shape), note, where) for name, note, where in notes
        ]
        layers.append(_layer([sites[i] for i in members], key, bias, names, partly))
    # everything else is left over, each with its reason
    taken = {names[leaf] for leaf, _ in (*groups, *biases.values())}
    problems = bypasses(bypassed, analysis) | problems
    uncovered = tuple(
        Uncovered(
            name,
            tuple(leaves[name].shape),
            reason(i, problems, tapped, analysis.names(i)),
            listed(consumer.line for consumer in analysis.consumers.get(i, [])),
        )
        for i, name in enumerate(names)
        if name not in taken
    )
    return tuple(sites), tuple(owner), Layers(tuple(_distinct(layers)), uncovered)


def _by_kernel(sites: Sequence[Site], problems: dict[int, str]) -> dict[Key, list[int]]:
    """Numbers of the sites of each kernel; why the parameters of others have none."""
    groups: dict[Key, list[int]] = {}
    for i, site in enumerate(sites):
        why = _unfit(site)
        if why is not None:
            problems |= {o.leaf: why for o in site.params if o is not None}
        elif (kernel := site.params[0]) is not None:
            groups.setdefault(kernel.key, []).append(i)
    # an addition is no layer of its own where a product has it for its bias
    biased = {site.bias for site in sites}
    return {
        key: members
        for key, members in groups.items()
        if key not in biased or not all(sites[i].found for i in members)
    }


def _is_scale(site: Site) -> bool:
    return isinstance(site.geometry, ScaleShift)


def _biases(
    groups: Mapping[Key, Sequence[int]],
    sites: list[Site],
    problems: dict[int, str],
) -> dict[Key, Key]:
    """The bias of each kernel, where all uses that have one agree on it and no other kernel uses
    it, nor a part of it.
    """
    # pairs (kernel, bias) of all uses
    pairs = [(key, sites[i].bias) for key, members in groups.items() for i in members]
    pairs = [(key, bias) for key, bias in pairs if bias is not None]
    own = own_biases(pairs)
    problems |= {
        bias[0]: "kernel and bias are shared by different layers"
        for key, bias in pairs
        if own.get(key) != bias
    }
    # parts of one parameter that overlap another layer's are no bias
    free = apart(dict.fromkeys([*groups, *own.values()]), {})
    own = {key: bias for key, bias in own.items() if bias in free and bias not in groups}
    for key, members in groups.items():
        for i in members:
            # the use stays, without its bias
            if sites[i].bias not in (None, own.get(key)) and sites[i].bias not in free:
                sites[i] = sites[i]._replace(params=sites[i].params[:1])
    return own


def _not_of_reals(dtypes: Mapping[int, Any]) -> dict[int, str]:
    """Parameters that no block is for, whatever uses them."""
    problems = {}
    for i, dtype in dtypes.items():
        if jnp.issubdtype(dtype, jnp.complexfloating):
            problems[i] = COMPLEX
        elif not jnp.issubdtype(dtype, jnp.floating):
            problems[i] = NOT_REAL
    return problems


def _layer(
    sites: Sequence[Site],
    key: Key,
    bias: Key | None,
    names: Sequence[str],
    partly: Sequence[Uncovered],
) -> Layer:
    kernel, part = names[key[0]], key[1]
    # the first of them says how the kernel is stored
    # a look-up comes before a head that shares its table, and a use before one the other way round
    first = min(sites, key=lambda site: (not isinstance(site.geometry, Lookup), site.swapped))
    kinds = {site.geometry.kind for site in sites}
    groups, inputs, outputs = matrix_shape(first.geometry, first.kernel)
    mixed = bias is not None and any(site.bias is None for site in sites)
    swapped = any(site.swapped for site in sites)
    # SUA: plain convolutions, whose bias is in all uses or in none
    channels = 0
    if isinstance(first.geometry, Conv) and not mixed:
        channels = first.geometry.plain_channels(first.kernel)
    # how often scans around a use run it
    uses = [math.prod(site.loops) for site in sites]
    # rows of all uses together
    rows = sum(n * math.prod(site.row_shape) for n, site in zip(uses, sites, strict=True))
    return Layer(
        path=kernel.rpartition("/")[0] or kernel,
        kind="tied_embedding" if len(kinds & {"embedding", "dense"}) > 1 else first.geometry.kind,
        kernel=kernel,
        bias=None if bias is None else names[bias[0]],
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
        part=part,
        bias_part=None if bias is None else bias[1],
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


def _fitting(
    members: Sequence[int],
    sites: list[Site],
    leaf: Any,
) -> tuple[list[int], str | None]:
    """The uses of a kernel that are those of one layer, and what is wrong with it.

    Taps have to agree; what was found in the program is left out where it does not fit them.
    """
    # the front end knows best: a tap leads, then a use with a bias
    taps = [i for i in members if not sites[i].found]
    biased = [i for i in members if sites[i].bias is not None]
    lead = sites[(taps or biased or members)[0]]
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
    # two taps on one kernel have to agree
    return kept, None if alike else "layers of different kinds share it"


def _alike(sites: Sequence[Site]) -> bool:
    """Whether uses of one kernel see the same matrix in it: of one kind, or an embedding that is
    also the head.
    """
    if not sites:
        return True
    kinds = {site.geometry.kind for site in sites}
    if kinds == {"embedding", "dense"}:
        # the head of a tied table sees its transpose
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
    """Layers of one module with several kernels are told apart by the kernel, those of one kernel by
    their part of it; paths name rows in the state.
    """
    # a path alone would name several
    count = collections.Counter(layer.path for layer in layers)
    return [
        layer
        if count[layer.path] == 1
        else dataclasses.replace(layer, path=f"{layer.kernel}{layer.part or ''}")
        for layer in layers
    ]


def _misfit(site: Site, leaf: Any) -> str | None:
    """Why the kernel operand of a site is not the parameter as stored, if it is not."""
    origin = site.params[0]
    assert origin is not None
    # axes in front are those of a stack of layers
    moved = len(origin.permutation)
    if moved > len(site.kernel):
        return "the axes of its stack are not in front"
    used = (*site.kernel[: len(site.kernel) - moved], *(0,) * moved)
    stored = list(used)
    # the shape before the transpose
    for i, axis in enumerate(origin.permutation):
        stored[axis] = site.kernel[len(site.kernel) - moved + i]
    if origin.part is not None:
        stored = list(origin.part.shape)
    if tuple(leaf.shape) != (*site.stack, *stored):
        return f"its layer uses a part of it: {tuple(leaf.shape)} stored, {(*site.stack, *stored)} used"
    return None
