"""How work is divided over devices; that it changes no number is checked on eight of them in
`tests/compat/placement_checks.py`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import kfac_optax as ko
from kfac_optax._tree import tree_bytes
from kfac_optax.engine.accumulate import average_at
from kfac_optax.engine.division import divide
from kfac_optax.engine.near import GROWTH, SHARE, factor_errors, norms_allowed
from kfac_optax.engine.state import OwnFactors
from kfac_optax.linalg.tikhonov import factor_shifts
from tests import helpers as h
from tests.compat import placement_checks

MESH = AbstractMesh((8,), ("data",))
COSTS = {"wide": (3, 512.0), "middle": (13, 64.0), "small": (40, 1.0), "single": (1, 300.0)}


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_every_matrix_is_made_once_and_kept_by_as_many_devices_as_asked(workers):
    division = divide(ko.Placement("data", workers / 8, MESH), COSTS)
    for name, (copies, _) in COSTS.items():
        share = division.shares[name]
        made, kept = np.zeros(copies, int), np.zeros(copies, int)
        for group in range(8 // workers):
            kept[share.first[group] :][: share.kept[group]] += workers
            for start, count in zip(share.start[group], share.count[group], strict=True):
                made[start : start + count] += 1
        np.testing.assert_array_equal(made, 1)
        np.testing.assert_array_equal(kept, workers)
        # no device has more places than an even division needs
        assert share.slots == -(-copies // (8 // workers))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_who_keeps_what_does_not_depend_on_the_order_of_buckets(workers):
    """A state comes out of a compiled step with its buckets in another order; `[p, q]` and
    `[q, p]` cost the same.
    """
    costs = {"5x4": (3, 189.0), "4x5": (3, 189.0), "small": (5, 2.0)}
    placement = ko.Placement("data", workers / 8, MESH)
    one, other = (
        divide(placement, dict(order)).shares for order in (costs.items(), sorted(costs.items()))
    )
    for name in costs:
        np.testing.assert_array_equal(one[name].count, other[name].count)


def test_no_device_has_more_work_than_the_mean_and_one_matrix():
    division = divide(ko.Placement("data", 1.0, MESH), COSTS)
    load = sum(division.shares[name].count.ravel() * cost for name, (_, cost) in COSTS.items())
    mean = sum(copies * cost for copies, cost in COSTS.values()) / 8
    assert load.max() <= mean + max(cost for _, cost in COSTS.values())
    # one range after another, in turn over equal layers, would do worse
    turns = [sum(c * len(range(d, n, 8)) for n, c in COSTS.values()) for d in range(8)]
    assert load.max() < max(turns)


@pytest.mark.parametrize("statistics", ["averaged", "scattered", "local"])
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_dividing_a_state_and_putting_it_together_again_changes_nothing(workers, statistics):
    placement = ko.Placement("data", workers / 8, MESH, statistics=statistics)
    problem = h.plain_problem()
    _, state, _ = h.reference_run("kfac")
    divided = ko.divided_state(state, placement)
    tx = h.make_tx("kfac", problem, placement=placement, axis_name="data")
    shapes = jax.eval_shape(tx.init, problem.params)
    assert jax.tree.map(jnp.shape, divided) == jax.tree.map(jnp.shape, shapes)
    h.assert_equal(ko.whole_state(divided, placement), state)


def test_a_state_is_not_divided_twice_nor_put_together_as_another_placement_says():
    _, state, _ = h.reference_run("kfac")
    four, eight = (ko.Placement("data", 0.0, AbstractMesh((n,), ("data",))) for n in (4, 8))
    divided = ko.divided_state(state, eight)
    with pytest.raises(ValueError, match="divided_state: the state holds 8 .* expected 2"):
        ko.divided_state(divided, eight)
    with pytest.raises(ValueError, match="whole_state: the state holds 8 .* expected 4"):
        ko.whole_state(divided, four)
    with pytest.raises(ValueError, match="whole_state: the state holds 2 .* expected 8"):
        ko.whole_state(state, eight)


def test_a_divided_state_is_not_read_as_a_whole_one():
    placement = ko.Placement("data", 0.0, MESH)
    problem = h.plain_problem()
    _, state, _ = h.reference_run("kfac")
    message = "holds 8 inverses of dense_5x4_bias; expected 2.*whole_state"
    with pytest.raises(ValueError, match=message):
        ko.inverse_product(problem.layers, ko.divided_state(state, placement), problem.params)


def test_local_factors_are_read_by_the_placement_that_divided_them_alone():
    problem = h.plain_problem()
    _, state, _ = h.reference_run("kfac")
    averaged, local = (
        ko.Placement("data", 1.0, MESH, statistics=word) for word in ("averaged", "local")
    )
    divided = ko.divided_state(state, local)
    with pytest.raises(ValueError, match="divided_state: the factors of .* are divided"):
        ko.divided_state(divided, local)
    with pytest.raises(ValueError, match="whole_state: the factors of .* are divided"):
        ko.whole_state(divided, averaged)
    with pytest.raises(ValueError, match="whole_state: the factors of .* are whole"):
        ko.whole_state(state, local)
    # as many devices in other groups: places of the same shape, of other matrices
    other = ko.Placement("data", 0.5, MESH, statistics="local")
    with pytest.raises(ValueError, match=r"the devices have \[\[.*expected \[\[.*made with"):
        ko.whole_state(divided, other)
    message = "places for factors of dense_5x4_bias; expected 2.*whole_state"
    with pytest.raises(ValueError, match=message):
        ko.inverse_product(problem.layers, divided, problem.params)
    # places without a layer hold something too: of the whole state alone
    found, expected = ko.whole_state(divided, local), ko.diagnostics(state)["eigenvalue_max"]
    assert "eigenvalue_max" not in ko.diagnostics(divided)
    assert ko.diagnostics(found)["eigenvalue_max"] == expected


@pytest.mark.parametrize(
    ("words", "fraction", "message"),
    [
        (dict(axis_name=None), 0.0, "over axis 'data', and axis_name=None; expected axis_name="),
        (dict(axis_name="model"), 0.0, "axis_name='model'; expected axis_name= to name it"),
        (dict(stagger=2), 1.0, "got stagger=2 with statistics='local'"),
        (dict(coupling=ko.coarse_correction()), 0.0, "expected no coupling"),
        (dict(block=ko.rank_one()), 0.0, "which averages gradients themselves"),
        (dict(block=ko.ekfac_block()), 0.5, "'ekfac', which takes every .*worker_fraction=0"),
    ],
)
def test_what_needs_the_statistics_of_all_is_refused_beside_local_ones(words, fraction, message):
    layers = h.plain_problem().layers
    placement = ko.Placement("data", fraction, MESH, statistics="local")
    words = {"axis_name": "data", "block": ko.kronecker()} | words
    with pytest.raises(ValueError, match=message):
        ko.scale_by_curvature(layers, placement=placement, **words)


def test_local_statistics_need_a_mapped_axis_and_layers():
    problem = h.plain_problem()
    placement = ko.Placement("data", 0.0, MESH, statistics="local")
    tx = h.make_tx("kfac", problem, placement=placement, axis_name="data")
    state = ko.divided_state(h.initial_state("kfac"), placement)
    with pytest.raises(ValueError, match="'data' is not mapped here, and statistics='local'"):
        tx.update(problem.params, state, curvature=None, refresh=False)
    params = {"w": jnp.ones((2, 2)), "gain": jnp.ones(2)}
    predict = lambda p, x: ko.Normal(h.dense(x, p["w"]) * h.computed(p["gain"]))
    layers = ko.ggn(predict).layers(params, jnp.ones((3, 2)))
    words = dict(learning_rate=0.1, placement=placement, axis_name="data")
    with pytest.raises(ValueError, match="parameter 'gain' without inputs"):
        ko.kfac(layers, uncovered="diagonal", **words)
    ko.kfac(layers, **words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (dict(axis="model", mesh=MESH), "axis 'model' is not on the mesh, which has data"),
        (dict(axis=("data", "model"), mesh=MESH), "axis 'model' is not on the mesh"),
        (dict(axis="data", worker_fraction=0.3, mesh=MESH), "one of 1/8, 2/8, 4/8, 8/8"),
        (dict(axis="data", worker_fraction=3 / 8, mesh=MESH), "one of 1/8, 2/8, 4/8, 8/8"),
        (dict(axis="data", worker_fraction=1.5, mesh=MESH), "expected worker_fraction"),
        (dict(axis="data", worker_fraction=0.5), "got mesh=None"),
        (dict(axis="data", statistics="own", mesh=MESH), "one of 'averaged', 'scattered', 'local'"),
        (dict(axis="data", statistics="local"), "'local', which divides .*mesh=None"),
        (dict(axis="data", statistics="scattered"), "'scattered', which divides .*mesh=None"),
        (
            dict(axis="data", statistics="scattered", statistics_bits=8, mesh=MESH),
            "others have no averages",
        ),
        (dict(axis="data", statistics="local", packed=True, mesh=MESH), "no factor is sent"),
        (dict(axis="data", statistics="local", flops_per_byte=1.0, mesh=MESH), "no other device"),
        (dict(axis="data", statistics="local", statistics_bits=8, mesh=MESH), "it left out"),
        (dict(axis="data", statistics_bits=1), "statistics_bits=1; expected .* from 2 to 16"),
        (dict(axis="data", statistics_bits=8.0), "statistics_bits=8.0; expected a whole number"),
        (dict(axis="data", statistics_bits=8, statistics_dtype=jnp.bfloat16), "one of them"),
        (dict(axis="data", flops_per_byte=-1.0, mesh=MESH), "expected flops_per_byte >= 0"),
        (dict(axis="data", memory=0), "expected memory > 0"),
    ],
)
def test_a_placement_that_cannot_be_is_refused_at_once(words, message):
    with pytest.raises(ValueError, match=message):
        ko.Placement(**words)


def test_the_form_of_what_travels_needs_an_axis_to_sum_over():
    layers = h.plain_problem().layers
    forms = (dict(packed=True), dict(statistics_dtype=jnp.bfloat16), dict(statistics_bits=8))
    for words in forms:
        placement = ko.Placement("data", 1.0, MESH, **words)
        with pytest.raises(ValueError, match="expected axis_name="):
            ko.kfac(layers, learning_rate=0.1, placement=placement, bound="damped")
        ko.kfac(layers, learning_rate=0.1, placement=placement, axis_name="data", bound="damped")
    with pytest.raises(TypeError, match="statistics_dtype is"):
        ko.Placement("data", statistics_dtype=jnp.int32)


def test_the_axis_has_to_be_a_name():
    with pytest.raises(TypeError, match="axis is 3"):
        ko.Placement(3)


@pytest.mark.parametrize(
    "words", [dict(stagger=2), dict(inverse="cholesky", factored_gradient=True)]
)
def test_what_needs_all_inverses_is_refused_beside_a_divided_state(words):
    layers = h.plain_problem().layers
    with pytest.raises(ValueError, match="expected all devices to keep all of them"):
        ko.kfac(
            layers,
            learning_rate=0.1,
            placement=ko.Placement("data", 0.5, MESH),
            bound="damped",
            **words,
        )
    ko.kfac(
        layers,
        learning_rate=0.1,
        placement=ko.Placement("data", 1.0, MESH),
        bound="damped",
        **words,
    )


def test_a_placement_needs_a_mesh_or_a_mapped_axis():
    problem = h.plain_problem()
    tx = h.make_tx("kfac", problem, placement=ko.Placement("data"))
    state = h.initial_state("kfac")
    with pytest.raises(ValueError, match="axis 'data' is not mapped here, and mesh=None"):
        tx.update(problem.params, state, curvature=None, refresh=False)
    with pytest.raises(TypeError, match="placement is a str"):
        h.make_tx("kfac", problem, placement="data")


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_factorisation_that_fails_is_counted_once_and_the_old_one_stays(fraction):
    """As on one device, whoever keeps the matrix: of two equal layers the first is broken."""
    problem, devices = h.plain_problem(), 4
    _, state, _ = h.reference_run("kfac")
    break_first = lambda x: x.at[0].set(jnp.nan)
    core = state.preconditioner
    core = core._replace(factors=jax.tree.map(break_first, core.factors))
    broken = state._replace(preconditioner=core)
    placement = ko.Placement("data", fraction, AbstractMesh((devices,), ("data",)))

    def refresh(state, **words):
        tx = h.make_tx("kfac", problem, **words)
        return tx.update(problem.params, state, problem.params, curvature=None, refresh=True)[1]

    def on_device(inverses):
        mine = divided.preconditioner._replace(inverses=inverses)
        return refresh(divided._replace(preconditioner=mine), placement=placement)

    expected = jax.jit(refresh)(broken)
    assert int(expected.preconditioner.failed_inverses) == 1
    divided = ko.divided_state(broken, placement)
    held = divided.preconditioner.inverses
    if placement.divided:
        held = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), held)
    axes = 0 if placement.divided else None
    of_all = jax.vmap(on_device, axes, axis_name="data", axis_size=devices)
    after = jax.jit(of_all)(held)
    # one device has what all agree about; places of all devices are one behind another
    got = jax.tree.map(lambda x: x[0], after)
    if placement.divided:
        places = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after.preconditioner.inverses)
        got = got._replace(preconditioner=got.preconditioner._replace(inverses=places))
    h.assert_close(ko.whole_state(got, placement), expected)


def test_one_device_is_the_trivial_placement():
    """The program is the same, word for word."""
    problem = h.plain_problem()
    mesh = jax.make_mesh((1,), ("data",))
    programs = [
        jax.make_jaxpr(h.make_step(h.make_tx("kfac", problem, **words), problem))(
            problem.params, h.initial_state("kfac")
        )
        for words in ({}, {"placement": ko.Placement("data", 0.0, mesh)})
    ]
    assert str(programs[0]) == str(programs[1])


def test_errors_of_factors_move_no_eigenvalue_by_more_than_a_quarter_of_the_damping(x64):
    """The worst of their size: along the largest eigenvectors, of factors large, small and dead."""
    directions = lambda x: jnp.outer(*[jnp.linalg.eigh(x)[1][:, -1]] * 2)
    rows = jax.random.normal(jax.random.key(0), (2, 9, 3))
    factors = jnp.einsum("kni,knj->kij", rows, rows) / 9
    for scale_a, scale_g, damping in itertools.product((1e-3, 1.0, 30.0), (0.1, 3.0), (1e-3, 1.0)):
        a, g = scale_a * factors[0], scale_g * factors[1]
        of_a, of_g = factor_errors(a, g, jnp.asarray(damping))
        near_a, near_g = a + of_a * directions(a), g + of_g * directions(g)
        off = jnp.kron(near_a, near_g) - jnp.kron(a, g)
        assert jnp.linalg.norm(off, 2) <= damping / 4
        shift_a, shift_g = factor_shifts(a, g, damping)
        # with factored damping the ratios of both factors multiply
        assert (1 + of_a / shift_a) * (1 + of_g / shift_g) <= 5 / 4
        # never so large that a factor is lost in them
        assert of_a <= jnp.linalg.norm(a) / 12
        assert of_g <= jnp.linalg.norm(g) / 12
    assert factor_errors(0 * a, g, jnp.asarray(1.0))[0] == 0


def test_norms_allowed_are_those_with_which_averages_grow_by_no_more_than_there_is_room_for():
    assert 2 * GROWTH * SHARE + SHARE**2 < 1 / 4
    kept = jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])
    # the start of a state is no average of anything
    assert (norms_allowed(kept, average_at(jnp.int32(1), 0.9)) < 0).all()
    for count, decay in ((2, 0.9), (100, 0.9), (2, 0.0), (2**30, 1.0)):
        average = average_at(jnp.int32(count), decay)
        allowed = norms_allowed(kept, average)
        grown = average.weight * jnp.linalg.norm(kept, axis=(1, 2)) + (1 - average.weight) * allowed
        assert jnp.isfinite(allowed).all()
        if average.weight < 1:
            h.assert_close(grown, GROWTH * jnp.linalg.norm(kept, axis=(1, 2)))


@pytest.mark.parametrize("words", [{}, {"worker_fraction": 0.0}, {"statistics": "scattered"}])
def test_what_does_not_fit_into_memory_is_named_before_it_is_made(words):
    """As many bytes as the state has on a device are enough, one less is not."""
    params, batch = placement_checks.problem()
    layers = ko.ggn(placement_checks.predict).layers(params, *batch)

    def init(memory, **placed):
        placement = ko.Placement("data", **{"mesh": MESH} | placed, memory=memory)
        tx = ko.kfac(
            layers, learning_rate=0.1, axis_name="data", placement=placement, bound="damped"
        )
        return jax.eval_shape(tx.init, params).preconditioner

    state, needed = init(None, **words), {}
    for name, kept in state.factors.items():
        own = isinstance(kept, OwnFactors)
        factors = tree_bytes(kept.own if own else kept) / (8 if own else 1)
        inverses = tree_bytes(state.inverses[name]) / (8 if "worker_fraction" in words else 1)
        needed[name] = factors + inverses
    total, largest = sum(needed.values()), max(needed.values())
    init(total, **words)
    of_all = r"of all 2 buckets, .* of them of bucket dense_5x4_bias \(5 matrices 5 x 4\), take"
    with pytest.raises(ValueError, match=of_all):
        init(total - 1, **words)
    with pytest.raises(ValueError, match=r"init: the factors .* of bucket dense_5x4_bias .* take"):
        init(largest - 1, **words)
    with pytest.raises(ValueError, match="expected at most memory=1 bytes"):
        init(1, mesh=jax.make_mesh((1,), ("data",)))


@pytest.mark.parametrize("statistics", ["averaged", "scattered"])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_coverage_table_says_who_keeps_what(workers, statistics):
    """As the state is laid out, when every matrix has its own number in it."""
    params, batch = placement_checks.problem()
    layers = ko.ggn(placement_checks.predict).layers(params, *batch)
    placement = ko.Placement("data", workers / 8, MESH, statistics=statistics)
    table = ko.coverage(layers, placement=placement)
    state = ko.kfac(layers, learning_rate=0.1, bound="damped").init(params).preconditioner
    numbers = lambda x: 0 * x + jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))
    numbered = jax.tree.map(numbers, (state.factors, state.inverses))
    state = ko.divided_state(state._replace(factors=numbered[0], inverses=numbered[1]), placement)
    seen = dict.fromkeys(state.factors, 0)
    for layer, words in zip(layers, table.devices, strict=True):
        name = f"dense_5x{layer.outputs}_bias"
        said = words.removeprefix("factors ").split(", inverses ")
        for tree, devices in zip((state.factors, state.inverses), said, strict=True):
            kept = jax.tree.leaves(getattr(tree[name], "own", tree[name]))[0]
            if devices == "all":
                assert len(kept) == (5 if layer.outputs == 4 else 1)
                continue
            # of every device its places, of which one has the number of the layer in the bucket
            places = np.asarray(kept).reshape(8, -1, kept[0].size)[..., 0]
            low, _, high = devices.partition("-")
            assert (places[int(low) : int(high or low) + 1] == seen[name]).any(1).all()
        seen[name] += 1
    assert ("all" in str(table)) == (statistics == "averaged" or workers == 8)
    assert "kept on devices" in str(table)
    assert "kept on devices" not in str(ko.coverage(layers))
