"""The coverage table: which block each layer gets and how much state it keeps."""

import dataclasses

import jax
import jax.numpy as jnp

from kfac_optax._tree import tree_bytes
from kfac_optax._types import Block, Coupling, Layer, Layers
from kfac_optax.blocks.kronecker import kronecker


def coverage(
    layers: Layers, *, block: Block | None = None, coupling: Coupling | None = None, dtype: jnp.dtype = jnp.float32
) -> Layers:
    """Layers with the state that a block and a coupling keep for them; print the result.

    Bytes are those of the factors and of what is held between refreshes. The transformation adds a few scalar counters.

    Args:
      layers: from `fisher.layers(params, ...)`.
      block: per-layer curvature; default the Kronecker block of `kfac`.
      coupling: coarse correction, if any.
      dtype: dtype of the state.

    >>> import kfac_optax as ko
    >>> estimator = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
    >>> print(coverage(estimator.layers(jnp.zeros((2, 1)), jnp.ones((5, 2)))))
    layer   kind   kernel  bias  uses  block             state bytes
    ------  -----  ------  ----  ----  ----------------  -----------
    (root)  dense  2x1     no    1     kronecker (eigh)  52
    total                                                52
    """
    block = kronecker() if block is None else block
    copies = sum(layer.copies for layer in layers)
    across = 0
    if coupling is not None:
        chosen = coupling

        def coarse_state():
            statistic, sizes = chosen.init(copies, dtype), jnp.ones(copies, dtype)
            return statistic, chosen.factorize(statistic, sizes), sizes, jnp.arange(copies)

        across = tree_bytes(jax.eval_shape(coarse_state))
    return dataclasses.replace(
        layers,
        block=block.name,
        state_bytes=tuple(_layer_bytes(layer, block, dtype) for layer in layers),
        coupling="" if coupling is None else coupling.name,
        coupling_bytes=across,
    )


def _layer_bytes(layer: Layer, block: Block, dtype: jnp.dtype) -> int:
    def state():
        statistic = block.init(*layer.shape, dtype)
        return statistic, block.factorize(statistic, jnp.ones((), dtype))

    return layer.copies * tree_bytes(jax.eval_shape(state))
