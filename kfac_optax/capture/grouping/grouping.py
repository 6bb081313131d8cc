"""Which sites are uses of one layer, and why a parameter belongs to none."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kfac_optax._reasons import COMPLEX, NOT_REAL
from kfac_optax._types import Layer, Layers, Uncovered
from kfac_optax.capture.geometry import Conv, Dense, Lookup, ScaleShift
from kfac_optax.capture.grouping.align import aligned, layout_of, same_matrix
from kfac_optax.capture.grouping.explain import (
    bypasses,
    misfit,
    reason,
    that_see_data,
    unfit,
    unseen,
    uses_by_leaf,
)
from kfac_optax.capture.jaxpr.code_lines import listed
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
    dtypes = {}
    for i, name in enumerate(names):
        if i in tapped or analysis.consumers.get(i):
            dtypes[i] = leaves[name].dtype
    problems |= _not_of_reals(dtypes)
    groups = {key: members for key, members in groups.items() if key[0] not in problems}
    # a scale gives way to a kernel that has the same numbers
    scales = {key: _is_scale(sites[members[0]]) for key, members in groups.items()}
    groups = apart(groups, scales)
    groups = that_see_data(groups, sites, names, analysis.consumers, problems)
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
        mine = [key[0]] if bias is None else [key[0], bias[0]]
        partly = []
        for name, note, where in unseen(mine, uses, names, analysis.consumers):
            shape = tuple(leaves[name].shape)
            partly.append(Uncovered(name, shape, note, where))
        members_of_it = [sites[i] for i in members]
        layers.append(_layer(members_of_it, key, bias, names, partly))
    # everything else is left over, each with its reason
    taken = {leaf for leaf, _ in (*groups, *biases.values())}
    problems = bypasses(bypassed, analysis) | problems
    uncovered = []
    for i, name in enumerate(names):
        if i in taken:
            continue
        why = reason(i, problems, tapped, analysis.names(i))
        lines = listed(consumer.line for consumer in analysis.consumers.get(i, []))
        uncovered.append(Uncovered(name, tuple(leaves[name].shape), why, lines))
    coverage = Layers(tuple(_distinct(layers)), tuple(uncovered))
    return tuple(sites), tuple(owner), coverage


def _by_kernel(
    sites: Sequence[Site],
    problems: dict[int, str],
) -> dict[Key, list[int]]:
    """Numbers of the sites of each kernel; why the parameters of others have none."""
    groups: dict[Key, list[int]] = {}
    for i, site in enumerate(sites):
        why = unfit(site)
        if why is not None:
            mine = [origin.leaf for origin in site.params if origin is not None]
            problems |= dict.fromkeys(mine, why)
        elif (kernel := site.params[0]) is not None:
            groups.setdefault(kernel.key, []).append(i)
    # an addition is no layer of its own where a product has it for its bias
    for bias in {site.bias for site in sites}:
        if bias in groups and all(sites[i].found for i in groups[bias]):
            del groups[bias]
    return groups


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
    pairs = []
    for key, members in groups.items():
        biases = [sites[i].bias for i in members]
        pairs += [(key, bias) for bias in biases if bias is not None]
    own = own_biases(pairs)
    for key, bias in pairs:
        if own.get(key) != bias:
            problems[bias[0]] = "kernel and bias are shared by different layers"
    # parts of one parameter that overlap another layer's are no bias
    free = apart(dict.fromkeys([*groups, *own.values()]), {})
    own = {key: bias for key, bias in own.items() if bias in free and bias not in groups}
    for key, members in groups.items():
        for i in members:
            site = sites[i]
            foreign = site.bias not in (None, own.get(key))
            # the use stays, without its bias
            if foreign and site.bias not in free:
                sites[i] = site._replace(params=site.params[:1])
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
    leaf, part = key
    kernel = names[leaf]
    first = min(sites, key=_turn)
    kinds = {site.geometry.kind for site in sites}
    tied = len(kinds & {"embedding", "dense"}) > 1
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
    rows = 0
    for count, site in zip(uses, sites, strict=True):
        rows += count * math.prod(site.row_shape)
    module, _, _ = kernel.rpartition("/")
    return Layer(
        path=module or kernel,
        kind="tied_embedding" if tied else first.geometry.kind,
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
        mask=getattr(first.geometry, "mask", None),
    )


def _turn(site: Site) -> tuple[bool, bool]:
    """Which use says how the kernel is stored: a look-up before a head that shares its table, and
    one as stored before one the other way round.
    """
    return not isinstance(site.geometry, Lookup), site.swapped


def tapped_leaves(analysis: Analysis) -> set[int]:
    """Parameters that are operands of a tap."""
    tapped: set[int] = set()
    for site in analysis.sites:
        tapped.update(origin.leaf for origin in site.params if origin is not None)
    return tapped


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
        if site is None or (site.found and taps and misfit(site, leaf) is not None):
            continue
        # a bias belongs to the layer's outputs
        sites[i] = site._replace(params=site.params[:1]) if site.swapped else site
        kept.append(i)
    for i in kept:
        if (reason := misfit(sites[i], leaf)) is not None:
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
        kernels = [site.params[0] for site in heads]
        return all(kernel and kernel.permutation == (-1, -2) for kernel in kernels)
    return all(same_matrix(site, sites[0]) for site in sites)


def _distinct(layers: Sequence[Layer]) -> list[Layer]:
    """Layers of one module with several kernels are told apart by the kernel, those of one kernel by
    their part of it; paths name rows in the state.
    """
    # a path alone would name several
    count = collections.Counter(layer.path for layer in layers)
    distinct = []
    for layer in layers:
        if count[layer.path] > 1:
            path = f"{layer.kernel}{layer.part or ''}"
            layer = dataclasses.replace(layer, path=path)
        distinct.append(layer)
    return distinct
