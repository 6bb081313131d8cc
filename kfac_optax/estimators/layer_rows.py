"""The rows of layers that the matrix behind a curvature is made of, for all its columns."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfac_optax._types import Layer, PyTree
from kfac_optax.capture.evaluate import Zeros, from_cotangent
from kfac_optax.capture.geometry import Lookup
from kfac_optax.capture.layers import Traced
from kfac_optax.capture.row_axes import rows_of_site, steps_in_a_row
from kfac_optax.capture.sites import Site
from kfac_optax.estimators.centring import is_centred
from kfac_optax.estimators.heads import Kind, count_examples, find_weights, of_losses, split_outputs
from kfac_optax.estimators.linearization import Asked, linearize_now, rows_measure
from kfac_optax.estimators.output_cotangents import Naturals, OutputCotangents
from kfac_optax.estimators.plan import Plan, set_up
from kfac_optax.estimators.sample_jacobian import columns_of
from kfac_optax.linalg.gram import homogeneous

_CHUNK = 8  # pullbacks at the same time


class LayerRows(NamedTuple):
    """Rows of all uses of one layer: its part of row `(b, k)` of `J` is `sum_t a_bt g_kbt^T`.

    Attributes:
      a: inputs `[copies, N, T, p]`, `T` counting positions and uses, the bias coordinate included;
        tokens `[1, N, T]` of an embedding; what is scaled, `[1, N, T, q]`, of a normalisation.
      g: output gradients `[K, copies, N, T, q]`, `K` counting terms and columns of all heads.
    """

    a: jax.Array
    g: jax.Array


def layer_rows(
    kind: Kind,
    traced: Traced,
    inputs: Sequence[Any],
    layers: Sequence[Layer],
    *,
    key: jax.Array | None = None,
    samples: int = 1,
    axis_name: Any = None,
) -> dict[Layer, LayerRows]:
    """Rows of these layers, in their order; `J` is made of them where examples do not interact.

    Args:
      kind: of estimator.
      traced: the model.
      inputs: leaves of its parameters and arguments.
      layers: which ones.
      key: draws labels, as in `sample_jacobian`.
      samples: draws for every term.
      axis_name: mapped axis over which the batch is split.

    Raises:
      ValueError: a layer has no rows that its gradient could be made of, or scores are centred.
    """
    # of the plan only its layers are read: nothing is measured, rows are kept as they are
    plan = Plan(tuple(layers), (), None, None)
    setting = set_up(plan, traced, 0, None, kind.name)
    owner = setting.owner
    used = [setting.layer(plan, i) for i in range(len(layers))]
    _check(kind.name, used)
    # probes hand the rows back as cotangents
    measures = [None if i is None else rows_measure for i in owner]
    linearize = linearize_now(traced, inputs, lambda out: split_outputs(kind, out))
    no_inverses = [None] * len(measures)
    pull, heads = linearize(Asked(measures, no_inverses, None, ()))
    if not kind.losses:
        _check_centred(kind.name, heads)
    cotangents, counted = _cotangents(kind, heads, key, samples, axis_name)

    def pulled(k: jax.Array) -> list[PyTree]:
        sites = pull(cotangents.make(k)).sites
        found = []
        for site, i, kept in zip(traced.sites, owner, sites, strict=True):
            if i is not None and kept is not None:
                found.append(_of_site(site, used[i], kept))
        return found

    # [K, copies, N, T, q] of every use; a few columns exist at a time
    columns = jnp.arange(cotangents.count)
    found = jax.lax.map(pulled, columns, batch_size=_CHUNK)
    uses: dict[Layer, list] = {layer: [] for layer in layers}
    owners = [i for i in owner if i is not None]
    for i, (a, g) in zip(owners, found, strict=True):
        uses[layers[i]].append((a[0], g))  # inputs are the same for all columns
    rows = {}
    for layer, as_used in zip(layers, used, strict=True):
        rows[layer] = _joined(layer, uses[layer], counted, as_used.given_rows)
    return rows


def _check(where: str, layers: Sequence[Layer]) -> None:
    for layer in layers:
        reason = "; ".join(layer.notes)
        if layer.kind in ("tied_embedding", "diagonal", "masked"):
            reason = f"a layer of kind {layer.kind!r} has none"
        elif layer.swapped and not reason:
            reason = "what multiplies by its transposed weight has a cotangent for its input"
        elif not layer.per_example and not reason:
            reason = "axis 0 of its inputs is not the examples"
        if reason:
            raise ValueError(
                f"{where}: layer {layer.path or '(root)'!r} has no rows that its gradients are "
                f"made of: {reason}. Expected layers that see every example on its own; for "
                "others use linearize(), which is right for every model."
            )


def _check_centred(where: str, heads: Sequence[Any]) -> None:
    for head in filter(is_centred, heads):
        raise ValueError(
            f"{where}: {type(head).__name__} has scores about their mean over the batch, of which "
            "a row is not made of what one example does; expected no `layers=` (smw, spring), so "
            "that the kernel is made by linearize(), which centres."
        )


def _cotangents(
    kind: Kind,
    heads: Sequence[Any],
    key: Any,
    samples: int,
    axis_name: Any,
) -> tuple[OutputCotangents, jax.Array | None]:
    """One for every term of an example and column, of all examples at once; which examples count."""
    if kind.losses:
        return of_losses(heads), None
    examples = count_examples(kind, heads)
    roots = find_weights(kind, heads, axis_name).roots
    columns = columns_of(heads, roots, key, samples)
    # a cotangent for every term of an example and column of it, of all heads one after another
    terms = [math.prod(head.batch_shape[1:]) for head in heads]
    of_term = [column.count for column in columns]
    counts = [n * k for n, k in zip(terms, of_term, strict=True)]

    def make(k: jax.Array) -> Naturals:
        out, start = [], 0
        for head, column, count in zip(heads, columns, counts, strict=True):
            # zero for all heads but the one that column k belongs to
            mine = (k >= start) & (k < start + count)
            # columns of a term next to each other, as they are in a vector in sample space
            position = jnp.clip(k - start, 0, count - 1)
            term, c = jnp.divmod(position, column.count)
            chosen = mine & (jnp.arange(count // column.count) == term)
            # [terms] -> [N, terms] -> [*batch], the same term of every example
            of_all = jnp.broadcast_to(chosen, (examples, len(chosen)))
            of_all = of_all.reshape(head.batch_shape)
            out.append(tuple(column.weighted(x, of_all) for x in column.column(c)))
            start += count
        return out

    # weights of zero say which rows are padding
    cotangents = OutputCotangents(sum(counts), make)
    known = [jnp.asarray(root) for root in roots if root is not None]
    of_terms = [root.reshape(examples, -1) for root in known if root.ndim]
    if not of_terms:
        return cotangents, None
    counted = jnp.stack([root.any(1) for root in of_terms])
    return cotangents, counted.any(0)


def _of_site(
    site: Site,
    layer: Layer,
    kept: Zeros,
) -> tuple[jax.Array, jax.Array]:
    """Rows of one use, `[copies, N, T, ...]`."""
    a, g = rows_of_site(site, layer, *from_cotangent(site, kept.rows))
    tokens = isinstance(site.geometry, Lookup)  # rows of integers have no axis of features
    a = steps_in_a_row(a, site, 0 if tokens else 1)
    return a, steps_in_a_row(g, site, 1)


def _joined(
    layer: Layer,
    uses: list,
    counted: jax.Array | None,
    given: bool,
) -> LayerRows:
    """All uses on the axis of steps, padding taken out; `given` rows have the bias coordinate."""
    # uses behind one another on the axis of steps, a [copies, N, T, p] and g [K, copies, N, T, q]
    a = jnp.concatenate([a for a, _ in uses], 2)
    g = jnp.concatenate([g for _, g in uses], 3)
    if counted is not None:  # a cotangent of zero that met a NaN on its way back is a NaN
        kept = counted[:, None, None] | jnp.isfinite(g)
        g = jnp.where(kept, g, 0)
    if layer.kind == "embedding":
        return LayerRows(a, g)
    if layer.bias is not None and layer.kind != "scale_shift" and not given:
        a = homogeneous(a)
    # where nothing comes back the input has no part, whatever it holds
    unused = (g == 0).all((0, -1))
    return LayerRows(jnp.where(unused[..., None], 0, a), g)
