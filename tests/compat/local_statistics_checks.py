"""Checks of statistics that every device measures alone, run by `test_many_devices.py` on eight
devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from benchmarks import collectives
from kfac_optax.engine.placed import division_of
from tests import helpers as h
from tests.compat.placement_checks import predict, problem

DEVICES = 8
ESTIMATOR = ko.ggn(predict)


def placement_on(fraction):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    return ko.Placement("data", fraction, mesh, statistics="local")


def make(name="kfac", **words):
    params, (x, weights) = problem()
    layers = ESTIMATOR.layers(params, x, weights)
    return getattr(ko, name)(layers, learning_rate=0.1, damping=0.05, kl_clip=None, **words)


def step(tx, state, params, x, weights):
    curvature = ESTIMATOR.at(params, x, weights)
    return tx.update(params, state, params, curvature=curvature, refresh=True)


@functools.cache
def divided_step(fraction, tracked, name="kfac"):
    """A compiled step whose updates come from all devices, one behind another, and its state."""
    placement = placement_on(fraction)
    params, _ = problem()
    tx = make(name, placement=placement, axis_name="data")
    shardings = ko.state_shardings(tx, params, placement=placement)
    specs = jax.tree.map(lambda s: s.spec, shardings)

    def run(state, params, x, weights):
        updates, state = step(tx, state, params, x, weights)
        return jax.tree.map(lambda u: u[None], updates), state

    mapped = jax.shard_map(
        run,
        mesh=placement.mesh,
        in_specs=(specs, P(), P("data"), P("data")),
        # what is tracked as the same everywhere is; else look at all devices
        out_specs=(P() if tracked else P("data"), specs),
        check_vma=tracked,
    )
    return jax.jit(mapped), jax.jit(tx.init, out_shardings=shardings)(params)


@functools.cache
def single_step(name="kfac"):
    tx = make(name)
    return jax.jit(functools.partial(step, tx)), jax.jit(tx.init)(problem()[0])


def local_on_equal_batches():
    """Where all devices see the same batch nothing differs from averaged statistics, whoever keeps
    what; every device has the same updates, and places stay where they are.
    """
    params, (x, weights) = problem()
    tiled = jnp.tile(x, (DEVICES, 1)), jnp.tile(weights, DEVICES)
    for fraction, tracked, name in (
        (0.0, False, "kfac"),
        (0.25, True, "kfac"),
        (1.0, True, "kfac"),
        (0.0, True, "ekfac"),
    ):
        run, state = divided_step(fraction, tracked, name)
        got, after = run(state, params, *tiled)
        _, after = run(after, params, *tiled)
        single, whole = single_step(name)
        expected, whole = single(whole, params, x, weights)
        _, whole = single(whole, params, x, weights)
        many = 1 if tracked else DEVICES
        h.assert_close(got, jax.tree.map(lambda u: jnp.stack([u] * many), expected))
        h.assert_close(ko.whole_state(after, placement_on(fraction)), whole)
        # back again, whatever empty places show
        again = ko.divided_state(
            ko.whole_state(after, placement_on(fraction)), placement_on(fraction)
        )
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, after)


def local_on_parts_of_a_batch():
    """The factors of a layer are those of its owner's part, measured on one device."""
    params, (x, _) = problem()
    weights = jnp.ones(len(x))
    run, state = divided_step(0.25, True)
    _, after = run(state, params, x, weights)
    placement = placement_on(0.25)
    found = ko.whole_state(after, placement).preconditioner.factors
    single, start = single_step()
    each = x.reshape(DEVICES, -1, *x.shape[1:])
    alone = jax.vmap(lambda part: single(start, params, part, jnp.ones(len(part))))(each)[1]
    copies = {name: jax.tree.leaves(tree)[0].shape[0] for name, tree in found.items()}
    shares = division_of(placement, copies, found).shares
    owners = set()
    for name, share in shares.items():
        owner = np.repeat(np.arange(DEVICES), share.count.ravel())
        owners |= set(owner.tolist())
        measured = alone.preconditioner.factors[name]
        rows = np.arange(share.copies)
        h.assert_close(found[name], jax.tree.map(lambda m, o=owner, r=rows: m[o, r], measured))
    # five equal layers and one more, on devices of their own
    assert len(owners) >= 5


def local_with_a_bad_part():
    """What one device cannot use none does, so that all factors are means of the same steps: a part
    that is not finite, or has no example.
    """
    params, (x, _) = problem()
    weights = jnp.ones(len(x))
    run, state = divided_step(0.25, True)
    _, good = run(state, params, x, weights)
    for batch, skipped in (((x.at[-1].set(jnp.nan), weights), 1), ((x, weights.at[-2:].set(0)), 0)):
        _, after = run(good, params, *batch)
        before, now = good.preconditioner, after.preconditioner
        h.assert_equal(now.factors, before.factors)
        assert int(now.curvature_count) == 1
        assert int(now.skipped_statistics) == skipped


def local_with_a_layer_of_zeros():
    """A layer that no example reaches, on a device of its own, does not keep the others from
    learning; and what divides the factors says so wherever all are wanted.
    """
    key, x = jax.random.key(1), jnp.ones((DEVICES, 3))
    params = {name: jax.random.normal(key, (3, 3)) for name in "ab"}
    # behind a gate that is shut neither inputs nor cotangents are left
    shut = lambda params, x, gate: ko.Normal(
        h.dense(x, params["a"]) + gate * h.dense(gate * x, params["b"])
    )
    estimator, gate = ko.ggn(shut), jnp.zeros(())
    placement, layers = placement_on(0.0), estimator.layers(params, x, gate)
    words = {"axis_name": "data", "placement": placement}
    tx = ko.scale_by_curvature(layers, block=ko.kronecker(), damping=0.1, **words)
    specs = jax.tree.map(lambda s: s.spec, ko.state_shardings(tx, params, placement=placement))

    def run(state, params, x):
        curvature = estimator.at(params, x, gate)
        return tx.update(params, state, params, curvature=curvature, refresh=True)

    mapped = jax.shard_map(
        run, mesh=placement.mesh, in_specs=(specs, P(), P("data")), out_specs=(P(), specs)
    )
    _, state = jax.jit(mapped)(jax.jit(tx.init)(params), params, x)
    assert int(state.curvature_count) == 1
    found = ko.whole_state(state, placement).factors
    # A and G of "a", 1 1^T and I, and of "b" nothing, in the order in which they run
    inputs, outputs = jax.tree.leaves(found)
    h.assert_close(inputs, jnp.stack([jnp.ones((3, 3)), jnp.zeros((3, 3))]))
    h.assert_close(outputs, jnp.stack([jnp.eye(3), jnp.zeros((3, 3))]))
    assert "eigenvalue_max" not in ko.diagnostics(state)
    with pytest.raises(ValueError, match="inverse_product: the state holds 8 places for factors"):
        ko.inverse_product(layers, state, params)
    with pytest.raises(ValueError, match="factor_metric: the factors in the state are divided"):
        ko.factor_metric(layers)(state, params)


def mixed(params, x, tokens):
    """Convolution, table, scale and shift, and three equal layers in a recomputed scan."""
    conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NWC", "WIO", "NWC"))
    s = conv(x, params["conv"], (1,), "SAME") + params["table"][tokens]
    s = jnp.tanh(s * params["scale"] + params["shift"])

    @jax.checkpoint
    def body(s, w):
        return jnp.tanh(s @ w), None

    s, _ = jax.lax.scan(body, s, params["deep"])
    return ko.Normal(s.mean(1) @ params["head"])


def in_every_layer(*cases):
    """Kinds of layers, a scan whose layers have owners of their own, parts of a batch one after
    another, and an estimator without gradients: on equal batches the numbers of one device.
    """
    keys = jax.random.split(jax.random.key(2), 6)
    shapes = {"conv": (3, 2, 4), "table": (5, 4), "deep": (3, 4, 4), "head": (4, 2)}
    params = {
        name: jax.random.normal(key, shape) for (name, shape), key in zip(shapes.items(), keys)
    } | {"scale": jnp.ones(4), "shift": jnp.zeros(4)}
    batch = jax.random.normal(keys[4], (4, 6, 2)), jax.random.randint(keys[5], (4, 6), 0, 5)
    tiled = jax.tree.map(lambda a: jnp.concatenate([a] * DEVICES), batch)
    for statistics, kind, name, settings, size in cases:
        estimator = getattr(ko, kind)(mixed)
        layers = estimator.layers(params, *batch)
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
        placement = ko.Placement("data", 0.0, mesh, statistics=statistics)

        make = functools.partial(getattr(ko, name), layers, damping=0.05, **settings)

        def run(tx, state, params, *batch, estimator=estimator, size=size):
            words = {} if size is None else {"microbatch_size": size}
            curvature = estimator.at(params, *batch, **words)
            return tx.update(params, state, params, curvature=curvature, refresh=False)

        tx = make()
        expected, whole = jax.jit(functools.partial(run, tx))(tx.init(params), params, *batch)
        tx = make(axis_name="data", placement=placement)
        shardings = ko.state_shardings(tx, params, placement=placement)
        specs = jax.tree.map(lambda s: s.spec, shardings)
        mapped = jax.shard_map(
            functools.partial(run, tx),
            mesh=mesh,
            in_specs=(specs, P(), P("data"), P("data")),
            out_specs=(P(), specs),
        )
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        got, after = jax.jit(mapped)(state, params, *tiled)
        h.assert_close(jax.device_get(got), jax.device_get(expected))
        h.assert_close(jax.device_get(ko.whole_state(after, placement)), jax.device_get(whole))


def local_in_every_layer():
    in_every_layer(
        ("local", "ggn", "kfac", {"learning_rate": 0.1}, 2),
        ("local", "forward_only", "foof", {}, None),
    )


def scattered_in_every_layer():
    in_every_layer(("scattered", "ggn", "kfac", {"learning_rate": 0.1}, 2))


def local_work():
    """A device does none of the work of layers that others measure: no product of rows with
    themselves is left outside of a branch.
    """
    found = {}
    for statistics in ("averaged", "local"):
        program = collectives.traced(0.0, "statistics", statistics=statistics)
        every = outside_of_branches(program.jaxpr)
        found[statistics] = sum(e.primitive.name == "dot_general" and of_rows(e) for e in every)
    # of seven layers two factors
    assert found == {"averaged": 14, "local": 0}


def of_rows(product):
    """Whether a product adds up over the examples of a device."""
    (axes, _), _ = product.params["dimension_numbers"]
    rows = collectives.EXAMPLES // DEVICES
    return [product.invars[0].aval.shape[axis] for axis in axes] == [rows]


def outside_of_branches(program):
    for equation in program.eqns:
        yield equation
        if equation.primitive.name != "cond":
            for inner in jex.jaxprs_in_params(equation.params):
                yield from outside_of_branches(inner)


def local_traffic():
    """No sum of factors is left in the compiled program of a statistic: two flags are sent, and the
    preconditioned gradients of any step.
    """
    words = {"statistics": "local"}
    ring = 7 / 8
    for fraction, kind in ((1.0, "statistics"), (0.0, "statistics"), (0.0, "plain")):
        text = collectives.compiled(fraction, kind, **words)
        counted = collectives.count(text)
        flags = 2 * ring * 2 * 4 if kind == "statistics" else 0
        assert counted.sent == collectives.predicted(fraction, kind, **words) + flags
        sums = re.findall(r"= (\S+) all-reduce", text)
        # one row of a layer `25 x 8` that all devices want, which a sum sends sooner than a gather
        largest = max([1, *map(collectives._bytes, sums)])
        assert largest < 24 * 24 * 4, sums
    averaged = collectives.count(collectives.compiled(0.0, "statistics"))
    assert averaged.sent > 3 * counted.sent


CHECKS = {
    check.__name__: check
    for check in (
        local_on_equal_batches,
        local_on_parts_of_a_batch,
        local_with_a_bad_part,
        local_with_a_layer_of_zeros,
        local_in_every_layer,
        local_work,
        local_traffic,
    )
}
# what differs little from others, for the slow tests
SLOW = {"scattered_in_every_layer": scattered_in_every_layer}
