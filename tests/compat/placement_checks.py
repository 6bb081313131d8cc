"""Checks of divided work on eight CPU devices, run by `test_many_devices.py` in processes of their
own.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from benchmarks import collectives
from kfac_optax.engine.division import divide, kept_rows
from kfac_optax.engine.exchange import from_groups, make_own
from kfac_optax.engine.near import factor_errors
from tests import helpers as h

DEVICES, EXAMPLES, DEEP = 8, 16, 5
AXES = {False: AxisType.Auto, True: AxisType.Explicit}


def predict(params, x, weights):
    """Several layers of one shape and one of another, so that buckets have 5 matrices and 1."""
    for i in range(len(params)):
        x = h.dense(x, params[f"layer_{i}"]["w"], params[f"layer_{i}"]["b"])
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return ko.Normal(x, weights=weights)


def problem():
    sizes = [*[4] * (DEEP + 1), 1]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = {
        f"layer_{i}": {"w": jax.random.normal(keys[i], (p, q)) / 2, "b": jnp.full(q, 0.1)}
        for i, (p, q) in enumerate(itertools.pairwise(sizes))
    }
    x = jax.random.normal(keys[-1], (EXAMPLES, 4))
    weights = jnp.array([0, 0, 1, 0, 0.5, 1, 1, 1, 0, 2, 1, 1, 0, 0, 3, 1], jnp.float32)
    return params, (x, weights)


def exchange():
    """What every device makes of its part is, put together, what is made of the whole: for all
    sizes of groups, one axis or two, with and without tracking, few matrices or many, and where
    every device makes the many, `9 < 10`, and sends the few.
    """
    costs, sent = {"few": (3, 8.0), "many": (21, 1.0)}, {"few": 1.0, "many": 1.0}
    whole = {name: jnp.arange(2.0 * n).reshape(n, 2) + 1 for name, (n, _) in costs.items()}
    meshes = {
        "data": jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,)),
        ("data", "model"): jax.make_mesh(
            (2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2
        ),
    }

    def on_device(division, whole):
        found = {}
        for name, share in division.shares.items():
            groups = share.count.shape[0]
            # of one group every device keeps all
            old = whole[name] if groups == 1 else kept_rows(division, share, whole[name])
            made = make_own(division, share, lambda old, new: 3 * new - old, old, whole[name])
            found[name] = made if groups == 1 else from_groups(division, share, made)
        return jax.tree.map(lambda x: x[None], found)

    options = itertools.product(meshes.items(), (1, 2, 8), (0, 1), (0.0, 10.0))
    for (axis, mesh), workers, tracked, ratio in options:
        # a group of one makes all that it keeps anyway
        if (tracked and axis != "data") or (ratio and (axis != "data" or workers == 1)):
            continue
        placement = ko.Placement(axis, workers / DEVICES, mesh, flops_per_byte=ratio)
        division = divide(placement, costs, sent)
        assert division.shares["many"].everywhere == bool(ratio)
        run = jax.shard_map(
            functools.partial(on_device, division),
            mesh=mesh,
            in_specs=P(),
            # what is tracked as the same everywhere is; else look at all devices
            out_specs=P() if tracked else P(axis),
            check_vma=bool(tracked),
        )
        count = 1 if tracked else DEVICES
        expected = jax.tree.map(lambda x: jnp.stack([2 * x] * count), whole)
        h.assert_equal(jax.jit(run)(whole), expected)


def steps(make, estimator, gradients):
    """`(state, params, *batch) -> (updates, state)` of a refresh and a step without one."""

    def run(state, params, *batch):
        tx = make()
        curvature = estimator.at(params, *batch)
        first, second = gradients
        _, state = tx.update(first, state, params, curvature=curvature, refresh=True)
        updates, state = tx.update(second, state, params, curvature=None, refresh=False)
        return updates, state

    return run


def check(name, fraction, mode, settings=None, **words_of_placement):
    """Updates with a placement are those without, and the state stays where it is."""
    params, batch = problem()
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, *batch)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    gradients = params, jax.tree.map(jnp.cos, params)

    preset = getattr(ko, name)
    alone = {"bound": "damped"} if "bound" in inspect.signature(preset).parameters else {}
    short = {"learning_rate": 0.1, "damping": 0.05} | alone | (settings or {})

    def make(**words):
        return preset(layers, **short, **words)

    single = jax.jit(steps(make, estimator, gradients))
    expected, whole = single(jax.jit(make().init)(params), params, *batch)
    placement = ko.Placement("data", fraction, mesh, **words_of_placement)
    words = {"placement": placement} | ({} if mode == "jit" else {"axis_name": "data"})
    tx = make(**words)
    run = steps(lambda: make(**words), estimator, gradients)
    shardings = ko.state_shardings(tx, params, placement=placement)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    if mode == "jit":
        x = jax.device_put(batch, NamedSharding(mesh, P("data")))
        got, after = jax.jit(run, out_shardings=(None, shardings))(state, params, *x)
    else:
        specs = jax.tree.map(lambda s: s.spec, shardings)
        mapped = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(specs, P(), P("data"), P("data")),
            out_specs=(P(), specs),
            check_vma=mode == "tracked",
        )
        got, after = jax.jit(mapped)(state, params, *batch)
    h.assert_close(jax.device_get(got), jax.device_get(expected))
    h.assert_close(jax.device_get(ko.whole_state(after, placement)), jax.device_get(whole))
    same = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), after, shardings)
    assert all(jax.tree.leaves(same))
    return after


def placement_schedule():
    """The traced schedule: branches agree about what is where, inside `shard_map` with varying axes
    tracked, and on explicit axes, where the types of the state never change.
    """
    params, (x, weights) = problem()
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x, weights)

    def make(**words):
        short = {"curvature_every": 1, "inverse_every": 2}
        return ko.kfac_two_level(
            layers, learning_rate=0.1, damping=0.05, bound="damped", **short, **words
        )

    def run(tx, state, params, x, weights):
        curvature = estimator.at(params, x, weights)
        updates, state = tx.update(params, state, params, curvature=curvature)
        return updates, state

    def twice(step, state, *arguments):
        return step(step(state, *arguments)[1], *arguments)

    single = jax.jit(functools.partial(run, make()))
    expected = jax.device_get(twice(single, make().init(params), params, x, weights)[0])
    for fraction, explicit in ((0.5, False), (0.25, True)):
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AXES[explicit],))
        placement = ko.Placement("data", fraction, mesh)
        tx = make(placement=placement, axis_name=None if explicit else "data")
        shardings = ko.state_shardings(tx, params, placement=placement)
        specs = jax.tree.map(lambda s: s.spec, shardings)
        step = functools.partial(run, tx)
        with jax.set_mesh(mesh):
            whole = jax.device_put(params, NamedSharding(mesh, P()))
            batch = jax.device_put((x, weights), NamedSharding(mesh, P("data")))
            state = jax.jit(tx.init, out_shardings=shardings)(whole)
            if not explicit:
                given = (specs, P(), P("data"), P("data"))
                step = jax.shard_map(step, mesh=mesh, in_specs=given, out_specs=(P(), specs))
            got, after = twice(jax.jit(step), state, whole, *batch)
            h.assert_close(jax.device_get(got), expected)
            h.assert_same_types(after, state)


def places(state):
    """Inverses of the bucket of equal layers that the first device has."""
    inverses = state.preconditioner.inverses["dense_5x4_bias"]
    return {x.addressable_shards[0].data.shape[0] for x in jax.tree.leaves(inverses)}


def placement_shard_map():
    """Inside `shard_map`, with varying axes tracked: bases collected to measure in, factors packed
    or in bits that do not suffice, moments beside them as they are; a rule of their own for when
    layers are due; the five equal layers made by all devices, `1701` operations for `200` bytes, and
    the other one sent, `1134` for `128`.
    """
    check("kfac", 1.0, "tracked", flops_per_byte=8.7)
    assert places(check("ekfac", 0.0, "tracked", packed=True, statistics_bits=2)) == {1}
    check("thor", 1.0, "tracked")


def placement_online():
    """Under `jit` with a mesh: what follows its factors online does so where it is kept, five equal
    layers in four groups of two devices.
    """
    assert places(check("b_r_kfac", 0.25, "jit", {"rank": 2})) == {2}


def placement_scattered():
    """Sums arrive at the device that factorises a layer alone: updates and factors are those of one
    device, weights of zero on whole devices included; a basis measured in is collected, and what is
    measured beside factors goes with them.
    """
    check("kfac", 0.25, "plain", statistics="scattered", packed=True)
    check("ekfac", 0.0, "tracked", statistics="scattered")


def placement_scattered_rows():
    """Rows of the batch are joined; and all devices keep the inverses of what one has measured."""
    check("b_r_kfac", 0.0, "tracked", {"rank": 2}, statistics="scattered")
    check("kfac", 1.0, "tracked", statistics="scattered")


def placement_scattered_bad_part():
    """What one device measures that is not finite leaves the factors of all as they were."""
    params, (x, weights) = problem()
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x, weights)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    placement = ko.Placement("data", 0.0, mesh, statistics="scattered")
    words = dict(axis_name="data", placement=placement)
    tx = ko.scale_by_curvature(layers, block=ko.kronecker(), **words)
    shardings = ko.state_shardings(tx, params, placement=placement)
    specs = jax.tree.map(lambda s: s.spec, shardings)

    def run(state, x, weights):
        curvature = estimator.at(params, x, weights)
        return tx.update(params, state, params, curvature=curvature, refresh=False)[1]

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=specs)
    step = jax.jit(mapped)
    good = step(jax.jit(tx.init, out_shardings=shardings)(params), x, weights)
    # one example that counts is enough, none teaches nothing
    few = step(good, x, jnp.zeros(EXAMPLES).at[3].set(1.0))
    assert int(few.curvature_count) == 2
    for batch, skipped in (((x.at[-1].set(jnp.nan), weights), 1), ((x, 0 * weights), 0)):
        after = step(good, *batch)
        h.assert_equal(after.factors, good.factors)
        assert int(after.curvature_count) == 1
        assert int(after.skipped_statistics) == skipped
    _skips_what_is_too_large_to_send(layers, mesh, specs, (x, weights))


def _skips_what_is_too_large_to_send(layers, mesh, specs, batch):
    """Finite where it was measured, 1e6 is not in half precision."""
    placement = ko.Placement(
        "data", 0.0, mesh, statistics="scattered", statistics_dtype=jnp.float16
    )
    words = dict(axis_name="data", placement=placement)
    tx = ko.scale_by_curvature(layers, block=ko.kronecker(), **words)
    params, (x, weights) = problem()[0], batch

    def run(state, x, weights):
        curvature = ko.ggn(predict).at(params, x, weights)
        return tx.update(params, state, params, curvature=curvature, refresh=False)[1]

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=specs)
    start = jax.jit(tx.init, out_shardings=jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    first = start(params)
    after = jax.jit(mapped)(first, x.at[0].set(1e3), weights.at[0].set(1.0))
    h.assert_equal(after.factors, first.factors)
    assert int(after.skipped_statistics) == 1


def placement_pmap():
    """Under `pmap` the state is made inside, and stays with a leading device axis."""
    params, batch = problem()
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, *batch)
    mesh = jax.make_mesh((DEVICES,), ("data",))
    gradients = params, jax.tree.map(jnp.cos, params)

    def make(**words):
        return ko.kfac(layers, learning_rate=0.1, damping=0.05, bound="damped", **words)

    expected, _ = jax.jit(steps(make, estimator, gradients))(make().init(params), params, *batch)
    words = dict(axis_name="data", placement=ko.Placement("data", 0.5, mesh))

    def run(params, *batch):
        state = make(**words).init(params)
        return steps(lambda: make(**words), estimator, gradients)(state, params, *batch)

    shards = jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), batch)
    got, _ = jax.pmap(run, axis_name="data", in_axes=(None, 0, 0))(params, *shards)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        h.assert_close(jax.device_get(x), jnp.broadcast_to(y, x.shape))


def statistics_in_few_bits():
    """Statistics near those of some steps before, while a half of the average is new they would have
    to be sent as they are: updates are off by what the guarantee
    gives, and all devices have the same. What is not finite leaves all as it was.
    """
    params, (x, weights) = problem()
    estimator = ko.ggn(predict)
    layers = estimator.layers(params, x, weights)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    batches = [*[(x + 0.1, weights)] * 4, (x, weights), (x.at[-1].set(jnp.nan), weights)]

    def run(bits):
        placement = ko.Placement("data", 1.0, mesh, statistics_bits=bits)
        words = dict(damping=0.05, axis_name="data", placement=placement)
        tx = ko.scale_by_curvature(layers, block=ko.kronecker(), **words)

        def step(state, x, weights):
            curvature = estimator.at(params, x, weights)
            found = tx.update(params, state, params, curvature=curvature, refresh=True)
            return jax.tree.map(lambda leaf: leaf[None], found)

        # not what is tracked as the same everywhere: all devices are looked at
        mapped = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P(), P("data"), P("data")),
                out_specs=P("data"),
                check_vma=False,
            )
        )
        state, found = tx.init(params), []
        for batch in batches:
            of_all = jax.device_get(mapped(state, *batch))
            h.assert_equal(of_all, jax.tree.map(lambda leaf: leaf[:1].repeat(8, 0), of_all))
            updates, state = jax.tree.map(lambda leaf: leaf[0], of_all)
            found.append((updates, state))
        (_, before), (_, after) = found[-2:]
        h.assert_equal(after.factors, before.factors)
        assert int(after.skipped_statistics) == 1
        return found[-2]

    (exact, whole), (rough, near) = run(None), run(16)
    limits = jax.jit(jax.vmap(factor_errors, (0, 0, None)))
    for name, kept in whole.factors.items():
        allowed = jax.device_get(limits(*kept, 0.05))
        for mine, right, bound in zip(near.factors[name], kept, allowed, strict=True):
            errors = np.linalg.norm(mine - right, axis=(1, 2))
            # in few bits they were sent: rounding is there, and no more than that
            assert (errors > 1e-5).all()
            assert (errors <= 1.2 * bound).all()
    for layer, right in exact.items():
        off = np.concatenate([(rough[layer][k] - right[k]).ravel() for k in right])
        size = np.concatenate([right[k].ravel() for k in right])
        # ||(P + E)^-1 E|| <= (1/4) / (1 - 1/4) with ||E|| <= damping / 4
        assert 0 < np.linalg.norm(off) <= np.linalg.norm(size) / 3, layer


def traffic():
    """Bytes in compiled programs are those of the planner's formulas, to the last one; besides
    them a divided state sends a count of failures in a refresh.
    """
    ring = 7 / 8
    for fraction, kind, more in (
        (None, "statistics", 0),
        (1.0, "refresh", 0),
        (0.25, "refresh", 2 * ring * 4),
        (0.0, "plain", 0),
    ):
        counted = collectives.count(collectives.compiled(fraction, kind))
        assert counted.number
        assert counted.sent == collectives.predicted(fraction, kind) + more, (fraction, kind)
    # of both shapes the one with less work for a byte is made everywhere
    for kind, words in (("statistics", {"packed": True}), ("refresh", {"flops_per_byte": 51.0})):
        counted = collectives.count(collectives.compiled(1.0, kind, **words))
        assert counted.sent == collectives.predicted(1.0, kind, **words), kind
    assert counted.sent < collectives.predicted(1.0, "refresh")
    # once to where it belongs, not to all and back; the two flags of all devices beside it
    for words in ({"statistics": "scattered"}, {"statistics": "scattered", "packed": True}):
        text = collectives.compiled(0.0, "statistics", **words)
        counted = collectives.count(text)
        said = collectives.predicted(0.0, "statistics", **words)
        assert counted.sent == said + 2 * ring * 2 * 4
        assert "reduce-scatter(" in text
        at_step = collectives.predicted(0.0, "plain")
        of_all = collectives.predicted(0.0, "statistics", packed="packed" in words) - at_step
        # half, and what rows of unequal length cost
        assert (said - at_step) < 0.75 * of_all
    words = {"statistics_bits": 8}
    text = collectives.compiled(1.0, "statistics", **words)
    near = collectives.count(collectives.always(text))
    assert near.sent == collectives.predicted(1.0, "statistics", **words)
    # in the branch that nobody takes where bits suffice
    rest = collectives.count(text).sent - near.sent
    assert rest == collectives.predicted(1.0, "statistics", packed=True)
    assert near.sent < 0.26 * rest


CHECKS = {
    check.__name__: check
    for check in (
        exchange,
        placement_shard_map,
        placement_online,
        placement_scattered,
        placement_scattered_bad_part,
        placement_pmap,
        placement_schedule,
        statistics_in_few_bits,
        traffic,
    )
}
# of minor cases, for the slow tests
SLOW = {"placement_scattered_rows": placement_scattered_rows}
