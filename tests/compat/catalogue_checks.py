"""Statistics of every method of the catalogue on eight devices, run by `test_many_devices.py`."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from kfac_optax.estimators.plan import Plan
from tests import helpers as h

DEVICES, EXAMPLES = 8, 16
# wide enough that a few columns of a batch are followed online
INPUTS, OUTPUTS = 24, 20


def predict(params, x, weights=None):
    """A layer for each block, side by side: one pass measures all of them."""
    return ko.Normal(sum(h.dense(x, w) for w in params.values()), weights=weights)


def losses(params, x, y):
    return predict(params, x).nll(y)


def batch():
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (EXAMPLES, INPUTS))
    y = jax.random.normal(keys[1], (EXAMPLES, OUTPUTS))
    # the last batch of an epoch, padded: two devices have nothing, others less than the rest
    weights = jnp.array([2, 1, 1, 3, 0.5, 1, 1, 1, 0, 2, 1, 1, 0, 0, 0, 0], jnp.float32)
    return x, y, weights


@functools.cache
def blocks():
    """One of each kind that the records have, by what the coverage table calls it."""
    x, y, _ = batch()
    (layer,) = ko.empirical_fisher(losses).layers({"w": jnp.zeros((INPUTS, OUTPUTS))}, x, y)
    records = [record for record in ko.CATALOGUE.values() if record.block_of is not None]
    made = [record.block_of(layer) for record in records]
    return {block.name: block for block in made}


def parameters(names):
    keys = jax.random.split(jax.random.key(0), len(names))
    return {n: jax.random.normal(k, (INPUTS, OUTPUTS)) / 5 for n, k in zip(names, keys)}


def curvatures(x, y, weights):
    """Blocks that one pass can measure: by products of the exact curvature, by rows of it and by
    mean gradients of the examples' own losses.
    """
    found = blocks()
    of_losses = {n: b for n, b in found.items() if b.first_moments}
    of_rows = {n: b for n, b in found.items() if b.absorb and b.absorbs == "columns"}
    exact = {n: b for n, b in found.items() if n not in of_losses | of_rows}
    own = lambda params: ko.empirical_fisher(losses).at(params, x, y)
    return (
        (exact, lambda params: ko.ggn(predict).at(params, x, weights)),
        (of_losses, own),
        (of_rows, own),
    )


def statistics(axis_name, x, y, weights):
    measured = []
    for chosen, at in curvatures(x, y, weights):
        params = parameters(chosen)
        layers = tuple(ko.empirical_fisher(losses).layers(params, x, y))
        blocks = tuple(chosen[layer.kernel] for layer in layers)
        inverses = tuple(_first(block, layer) for block, layer in zip(blocks, layers))
        plan = Plan(layers, blocks, None, jnp.float32, axis_name, 0, inverses)
        found = zip(blocks, at(params).statistics(plan)[0])
        measured.append({b.name: _without_signs(b, statistic) for b, statistic in found})
    return measured


def _first(block, layer):
    """What a block that measures in it holds before that, of one matrix."""
    if not block.reads_inverse:
        return None
    one = block.factorize(block.init(layer, jnp.float32), jnp.float32(0.1))
    return jax.tree.map(lambda x: x[None], one)


def _without_signs(block, statistic):
    """Columns as their products: their signs are random."""
    if not block.absorb or block.absorbs != "columns":
        return statistic
    product = lambda c: jnp.einsum("...np,...nq->...pq", c, c)
    return statistic[0], jax.tree.map(product, statistic[1])


def catalogue(everywhere=False):
    """Statistics of a split batch are those of the whole in `shard_map` with tracked axes;
    `everywhere` by sharded arrays and in `pmap` too.
    """
    single = jax.jit(functools.partial(statistics, None))
    expected = jax.device_get(single(*batch()))
    assert sum(map(len, expected)) == len(blocks()) >= 17
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    mapped = functools.partial(statistics, "data")
    tracked = jax.shard_map(mapped, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=True)
    h.assert_close(jax.device_get(jax.jit(tracked)(*batch())), expected)
    if not everywhere:
        return
    split = NamedSharding(mesh, P("data"))
    h.assert_close(jax.device_get(single(*jax.device_put(batch(), split))), expected)
    shards = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in batch()]
    got = jax.device_get(jax.pmap(mapped, axis_name="data")(*shards))
    h.assert_close(jax.tree.map(lambda x: x[3], got), expected)


def catalogue_everywhere():
    """The same in all ways to split a batch."""
    catalogue(everywhere=True)


CHECKS = {check.__name__: check for check in (catalogue, catalogue_everywhere)}
