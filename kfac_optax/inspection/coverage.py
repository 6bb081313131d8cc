"""The coverage table: every layer with its block and the bytes of its state, and what is left over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kfac_optax._tree import make_buckets, tree_bytes
from kfac_optax._types import Block, Coupling, Fine, Layer, Layers
from kfac_optax.engine.choice import BlockOf, blocks_of, check_coupled, cover
from kfac_optax.engine.placed import division_of
from kfac_optax.engine.placement import Placement
from kfac_optax.engine.state import start_of_bucket
from kfac_optax.estimators.plan import of_first_moments


def coverage(
    layers: Layers,
    *,
    block: Block | BlockOf | None = None,
    coupling: Coupling | None = None,
    uncovered: str = "graft",
    normalization: str = "unitwise",
    dtype: jnp.dtype = jnp.float32,
    placement: Placement | None = None,
) -> Layers:
    """Layers with the state that a block and a coupling keep for them; print the result.

    Bytes are those of the factors and of what is held between refreshes. The transformation adds a
    few scalar counters.

    Args:
      layers: from `fisher.layers(params, ...)`.
      block: per-layer curvature, as for `scale_by_curvature`; default the Kronecker block of
        `kfac`.
      coupling: as for `scale_by_curvature`, if any.
      uncovered: as for `kfac`.
      normalization: as for `kfac`.
      dtype: dtype of the state.
      placement: as for `scale_by_curvature`; with it the table says which devices keep the factors
        and the inverses of a layer. Bytes stay those of all of them once.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> print(coverage(estimator.layers(jnp.zeros((2, 1)), jnp.ones((5, 2)))))
    layer   kind   kernel  bias  uses  block             state bytes
    ------  -----  ------  ----  ----  ----------------  -----------
    (root)  dense  2x1     no    1     kronecker (eigh)  52
    total                                                52
    """
    layers = cover(layers, uncovered=uncovered, normalization=normalization, where="coverage")
    block_of = blocks_of(block, normalization=normalization)
    # what cannot be measured together is an error here already
    blocks = tuple(map(block_of, layers))
    of_first_moments(layers.layers, blocks, coupling, "coverage")
    # factors, and what `factorize` makes of them
    pairs = zip(layers, blocks, strict=True)
    of_layers = [_layer_bytes(layer, block, dtype) for layer, block in pairs]
    name, across = "", 0
    if coupling is not None:
        name = coupling.name
        across = _coupling_bytes(layers, blocks, coupling, dtype)
    return dataclasses.replace(
        layers,
        blocks=tuple(block.name for block in blocks),
        state_bytes=tuple(of_layers),
        devices=() if placement is None else _devices(layers, block_of, dtype, placement),
        coupling=name,
        coupling_bytes=across,
    )


def _devices(
    layers: Layers, block_of: BlockOf, dtype: jnp.dtype, placement: Placement
) -> tuple[str, ...]:
    """For every layer which devices keep its factors and its inverses."""
    buckets = make_buckets(layers.layers, block_of)
    factors = jax.eval_shape(lambda: {b.name: start_of_bucket(b, dtype) for b in buckets})
    copies = {bucket.name: bucket.copies for bucket in buckets}
    shares = division_of(placement, copies, factors).shares
    found: dict[Layer, str] = {}
    for bucket in buckets:
        count = shares[bucket.name].count
        # of every matrix the device that factorises it, and those of its group
        maker = np.repeat(np.arange(count.size), count.ravel())
        keepers = np.arange(count.size).reshape(count.shape)[maker // count.shape[1]]
        for layer, mine in bucket.slices:
            own = _numbers(maker[mine]) if placement.owned else "all"
            inverses = _numbers(keepers[mine]) if placement.divided else "all"
            found[layer] = f"factors {own}, inverses {inverses}"
    return tuple(found[layer] for layer in layers)


def _numbers(devices: np.ndarray) -> str:
    """Devices in words, neighbours as a range."""
    numbers = np.unique(devices)
    # a range ends where the next number is no neighbour
    ends = np.flatnonzero(np.diff(numbers) > 1) + 1
    parts = [(part[0], part[-1]) for part in np.split(numbers, ends)]
    return " ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _layer_bytes(layer: Layer, block: Block, dtype: jnp.dtype) -> int:
    # shapes alone: nothing is computed
    def state():
        statistic = block.init(layer, dtype)
        return statistic, block.factorize(statistic, jnp.ones((), dtype))

    return layer.copies * tree_bytes(jax.eval_shape(state))


def _coupling_bytes(
    layers: Layers,
    blocks: tuple[Block, ...],
    coupling: Coupling,
    dtype: jnp.dtype,
) -> int:
    check_coupled(layers, "coverage")
    coupling.check(layers.layers, blocks)
    coupled = [layer for layer in layers if layer.coupled]
    rows: list[tuple[Layer, Block]] = []
    for layer, block in zip(layers, blocks, strict=True):
        # a row for every matrix: layers of a stack and groups have one each
        if layer.coupled:
            rows += [(layer, block)] * layer.copies

    def state():
        one = jnp.ones((), dtype)
        sizes = jnp.ones(len(rows), dtype)

        def factors(row: int):
            layer, block = rows[row]
            return block.init(layer, dtype)

        def inverses(row: int):
            _, block = rows[row]
            return block.factorize(factors(row), one)

        # the block-diagonal level as a refresh sees it
        fine = Fine(factors, inverses, one, sizes)
        statistic = coupling.init(coupled, dtype)
        inverse = coupling.factorize(statistic, fine)
        return statistic, inverse, sizes, jnp.arange(len(rows))

    return tree_bytes(jax.eval_shape(state))
