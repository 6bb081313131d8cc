"""Why a parameter belongs to no layer, and what the statistics of a layer leave out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from kfac_optax._reasons import COMPLEX_LAYER, NOT_USED
from kfac_optax.capture.geometry import Contraction, Unsupported
from kfac_optax.capture.jaxpr.calls import is_rule
from kfac_optax.capture.jaxpr.code_lines import listed
from kfac_optax.capture.ownership import Key
from kfac_optax.capture.sites import STOPPED, Analysis, Consumer, Site


def unseen(
    leaves: Sequence[int],
    uses: Mapping[int, Sequence[Site]],
    names: Sequence[str],
    consumers: Mapping[int, Sequence[Consumer]],
) -> list[tuple[str, str, str]]:
    """Parameters with uses that the statistics do not see, which, and where; `uses` are those of
    all layers, from `uses_by_leaf`.
    """
    notes = []
    for leaf in leaves:
        reading = consumers.get(leaf, [])
        read_by = [x.name for x in reading]
        note, others = _other_uses(names[leaf], read_by, uses.get(leaf, []))
        where = listed(x.line for x in reading if x.name in others)
        if note:
            notes.append((names[leaf], note, where))
    return notes


def that_see_data(
    groups: Mapping[Key, list[int]],
    sites: Sequence[Site],
    names: Sequence[str],
    consumers: Mapping[int, Sequence[Consumer]],
    problems: dict[int, str],
) -> dict[Key, list[int]]:
    """Groups without those of which only products without data are seen, and not what meets data;
    why, in `problems`.

    Of `w / norm(w)` that is what the norm is made of, whose curvature is not that of `w`.
    """
    kept = {}
    for key, members in groups.items():
        mine = [sites[i] for i in members]
        # rows of a table see no data either
        idle = all(isinstance(x.geometry, Contraction) and not x.varies for x in mine)
        left = unseen([key[0]], uses_by_leaf(mine), names, consumers) if idle else []
        if left:
            problems[key[0]] = f"{left[0][1]}, but by products that no data enters"
        else:
            kept[key] = members
    return kept


def uses_by_leaf(sites: Iterable[Site]) -> dict[int, list[Site]]:
    """What layers see of every parameter, each use named by the equation that reads it."""
    uses: dict[int, list[Site]] = {}
    for site in sites:
        kernel, bias = site.params[0], site.bias
        if kernel is not None:
            uses.setdefault(kernel.leaf, []).append(site)
        if bias is not None:
            uses.setdefault(bias[0], []).append(site._replace(name="add"))
    return uses


def _other_uses(
    name: str,
    consumers: Sequence[str],
    sites: Sequence[Site],
) -> tuple[str, list[str]]:
    """A layer consumes each of its parameters once for every tap, and once for every use that was
    found, named by its equation; anything more the statistics do not see.
    """
    # each use that a layer has is one consumer less
    used = [x for x in consumers if x != STOPPED]
    for site in sites:
        if site.found and site.name in used:
            used.remove(site.name)
    # taps by modules see the output of whatever equation made it
    taps = sum(not site.found for site in sites)
    plain = [x for x in used if not is_rule(x)]
    rules = [x for x in used if is_rule(x)]
    # the first `taps` of them are those that the taps see
    extra = plain[taps:] + rules
    _, _, leaf = name.rpartition("/")
    if rules and len(plain) < taps:  # what a tap sees the output of
        words = f"{leaf} used through {_listed(rules)}: its own derivative rule, not measured"
        return words, rules
    if not extra:
        return "", extra
    return f"{leaf} also used by {_listed(extra)}: not measured", extra


def bypasses(leaves: set[int], analysis: Analysis) -> dict[int, str]:
    """Reasons of parameters whose layers have no part in the prediction, but which are used
    otherwise.
    """
    # what stands behind a stopped gradient has no derivative to measure
    reasons = {}
    for i in leaves:
        used = [x for x in analysis.names(i) if x != STOPPED]
        if used:
            reasons[i] = (
                f"only used by {_listed(used)}, not by the output of its layer: a derivative of it "
                "is not measured"
            )
    return reasons


def reason(
    index: int,
    problems: Mapping[int, str],
    tapped: set[int],
    consumers: Sequence[str],
) -> str:
    """Why a parameter is in no layer, given why some are, which a tap sees, and what else uses it."""
    if index in problems:
        return problems[index]
    if index in tapped:
        return "the kernel of its layer is not a parameter as stored"
    if not consumers:
        return NOT_USED
    used = [x for x in consumers if x != STOPPED]
    # all that is left is behind a stopped gradient
    if not used:
        return f"only used behind {STOPPED}, or for integers and flags"
    if all(map(is_rule, used)):
        return f"inside {_listed(used)}: its own derivative rule"
    return f"used by {_listed(used)} outside any supported layer"


def _listed(consumers: Sequence[str]) -> str:
    return ", ".join(sorted(set(consumers)))


def unfit(site: Site) -> str | None:
    """Why no layer can have this site."""
    if isinstance(site.geometry, Unsupported):
        return f"not supported: {site.geometry.reason}"
    dtypes = site.a.dtype, site.s.dtype
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return COMPLEX_LAYER
    return None


def misfit(site: Site, leaf: Any) -> str | None:
    """Why the kernel operand of a site is not the parameter as stored, if it is not."""
    origin = site.params[0]
    assert origin is not None
    # axes in front are those of a stack of layers
    in_place = len(site.kernel) - len(origin.permutation)
    if in_place < 0:
        return "the axes of its stack are not in front"
    stored = list(site.kernel)
    # the shape before the transpose
    for axis, size in zip(origin.permutation, site.kernel[in_place:], strict=True):
        stored[axis] = size
    if origin.part is not None:
        stored = list(origin.part.shape)
    used = (*site.stack, *stored)
    whole = tuple(leaf.shape)
    if whole != used:
        return f"its layer uses a part of it: {whole} stored, {used} used"
    return None
