"""Products with the second moments of the layers' inputs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kfac_optax._tree import gather, make_buckets, named_leaves, replace_leaves, scatter
from kfac_optax._types import Block, Layer, PyTree
from kfac_optax.blocks.embedding.embedding import embedding
from kfac_optax.blocks.embedding.tied_embedding import tied_embedding
from kfac_optax.blocks.kronecker.kronecker import kronecker
from kfac_optax.blocks.kronecker.masked import masked
from kfac_optax.estimators.curvature import LazyCurvature
from kfac_optax.estimators.plan import Plan
from kfac_optax.estimators.spec import Spec, trace_model


def forward_product(
    spec: Spec,
    params: PyTree,
    vector: PyTree,
    args: Sequence[PyTree],
) -> PyTree:
    """`(A_i (x) I) v_i` for every layer with weights between units, zero for other parameters."""
    found = trace_model(spec, params, args).layers.layers
    layers = tuple(layer for layer in found if layer.between_units)
    blocks = tuple(map(_block_of_inputs, layers))
    leaves = named_leaves(vector)
    kernels = [leaves[layer.kernel] for layer in layers]
    dtype = jnp.result_type(jnp.float32, *kernels)
    # the same statistics as an update would get, `G := I`; the part of the batch has been taken
    whole = spec._replace(subsample=None)
    curvature = LazyCurvature(params, tuple(args), None, whole)
    factors, _ = curvature.statistics(Plan(layers, blocks, None, dtype))
    out = {name: jnp.zeros_like(x) for name, x in leaves.items()}
    # one layer at a time: matrices [copies, p, q] and back to its leaves
    for layer, block, factor in zip(layers, blocks, factors, strict=True):
        (bucket,) = make_buckets([layer])
        matrices = gather(bucket, leaves, dtype)
        product = jax.vmap(block.multiply)(factor, matrices)
        out |= scatter(bucket, product, out)
    return replace_leaves(vector, out)


def _block_of_inputs(layer: Layer) -> Block:
    """What knows `A (x) I` of a layer with weights between units."""
    if layer.mask is not None:
        return masked(layer)
    # one-hot inputs: A is diagonal
    tables = {"embedding": embedding, "tied_embedding": tied_embedding}
    make = tables.get(layer.kind, kronecker)
    return make()
