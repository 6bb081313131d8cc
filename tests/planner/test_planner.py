"""Formulas of the planner against states and records; against counted bytes they are checked in
`tests/compat/placement_checks.py`."""

import itertools
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import kfac_optax as ko
from kfac_optax._tree import tree_bytes
from kfac_optax.planner import MODELS, Shape, costs
from kfac_optax.planner.__main__ import main, read_layers, table

SHAPES = (Shape(5, 4, 4), Shape(1, 5, 3))


def predict(params, x):
    for w in params["deep"]:
        x = ko.tap_dense(x @ w, x, w)
    w, b = params["last"]
    return ko.Normal(ko.tap_dense(x @ w + b, x, w, b))


def problem():
    params = {"deep": [jnp.eye(4)] * 5, "last": (jnp.ones((4, 3)), jnp.zeros(3))}
    return params, ko.ggn(predict).layers(params, jnp.ones((2, 4)))


@pytest.mark.parametrize("statistics", ["averaged", "scattered", "local"])
@pytest.mark.parametrize("fraction", [None, 1.0, 0.5, 0.25, 0.0])
def test_memory_is_that_of_the_state_on_one_device(fraction, statistics):
    owned = statistics != "averaged"
    if fraction is None and owned:
        with pytest.raises(ValueError, match="expected worker_fraction="):
            costs(SHAPES, 8, fraction, statistics=statistics)
        return
    params, layers = problem()
    words = {"statistics": statistics}
    mesh = AbstractMesh((8,), ("data",))
    placement = None if fraction is None else ko.Placement("data", fraction, mesh, **words)
    tx = ko.kfac(layers, kl_clip=None, placement=placement, axis_name="data")
    state = jax.eval_shape(tx.init, params).preconditioner
    devices = 8 if placement is not None and placement.divided else 1
    factors = tree_bytes(state.factors)
    if owned:  # the table of counts is no factor
        factors = sum(tree_bytes(x.own) for x in state.factors.values()) // 8
    kept = factors + tree_bytes(state.inverses) // devices
    assert costs(SHAPES, 8, fraction, statistics=statistics).memory == kept


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_is_sooner_made_than_sent_is_not_sent_and_never_costs_more(fraction):
    """In operations, with the time of a byte as many as it says."""
    shapes = (Shape(12, 8, 8), Shape(6, 64, 64), Shape(2, 512, 512))
    # an eigendecomposition has 9 (p^3 + q^3) operations for 4 (p^2 + q^2 + p + q) bytes
    limits = [9 * s.work / (4 * s.inverse) for s in shapes]
    sends = []
    for ratio in (0.0, *(1.01 * x for x in limits)):
        found = costs(shapes, 8, fraction, flops_per_byte=ratio)
        plain = costs(shapes, 8, fraction)
        sends.append(found.refresh)
        assert found.memory == plain.memory
        assert found.work + ratio * found.refresh <= plain.work + ratio * plain.refresh
    # one shape after the other is left out, the smallest first
    assert sends[0] > sends[1] > sends[2] > sends[3] == 0


def test_memory_without_placement_is_that_of_the_record():
    _, layers = problem()
    assert costs(SHAPES, 8, None).memory == 4 * ko.CATALOGUE["kfac"].numbers(layers)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("devices", [8, 64])
def test_more_devices_that_keep_each_mean_more_memory_and_less_traffic_in_a_step(name, devices):
    shapes = MODELS[name]()
    fractions = [m / devices for m in (1, 2, 4, 8) if m <= devices]
    found = [costs(shapes, devices, fraction) for fraction in fractions]
    total = costs(shapes, devices, None)
    for fewer, more in itertools.pairwise(found):
        assert fewer.memory <= more.memory <= total.memory
        assert fewer.step >= more.step
    # nobody sends more than a sum of all gradients
    assert found[0].step <= 2 * 4 * sum(s.copies * s.gradient for s in shapes)
    assert found[0].refresh == 0
    largest = max(9 * s.work for s in shapes)
    assert all(f.work <= total.work / devices + largest for f in found)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_a_refresh_on_eight_devices_is_within_a_fifth_of_an_eighth_or_of_the_largest_layer(
    name, fraction
):
    """The largest layer of ResNet-50 has a fifth of all work, and no layer is divided."""
    shapes = MODELS[name]()
    mean = costs(shapes, 8, None).work / 8
    largest = max(9 * s.work for s in shapes)
    assert costs(shapes, 8, fraction).work <= 1.2 * max(mean, largest)


def test_one_device_sends_nothing():
    alone = costs(SHAPES, 1, 1.0)
    assert alone == costs(SHAPES, 1, None)
    assert (alone.statistics, alone.refresh, alone.step, alone.balance) == (0, 0, 0, 1)


def test_the_command_reads_layers_and_prints_a_line_for_each_strategy(tmp_path, capsys):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps([[5, 4, 4], [1, 5, 3]]))
    assert read_layers(str(path)) == list(SHAPES)
    main(["--layers", str(path), "--devices", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == table(SHAPES, [4], 10, 100).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["4"] * 6


@pytest.mark.parametrize(
    ("words", "flag", "beside"),
    [
        (["--model", "bert_large", "--pipeline", "gpipe"], "--model", "--pipeline"),
        (["--packed", "--pipeline", "gpipe"], "--packed", "--pipeline"),
        (["--inverse-every", "100", "--pipeline", "gpipe"], "--inverse-every", "--pipeline"),
        (["--stages", "8", "--devices", "4"], "--stages", "no --pipeline"),
        (["--layers-of-stage", "3"], "--layers-of-stage", "no --pipeline"),
        (["--layers", "a.json", "--model", "bert_large"], "--model", "--layers"),
        (["--statistics-bits", "8", "--packed"], "--packed", "--statistics-bits"),
    ],
)
def test_a_flag_without_effect_is_refused(words, flag, beside, capsys):
    """Also one that repeats its default."""
    with pytest.raises(SystemExit):
        main(words)
    error = capsys.readouterr().err
    assert f"error: got {flag}, which has no effect beside {beside}; leave it out" in error


def test_bits_that_cannot_be_are_refused_and_fewer_send_less():
    for bits in (1, 17):
        with pytest.raises(ValueError, match="expected a whole number from 2 to 16"):
            costs(SHAPES, 8, 1.0, statistics_bits=bits)
    with pytest.raises(ValueError, match="expected worker_fraction= with them"):
        costs(SHAPES, 8, None, statistics_bits=8)
    packed = costs(SHAPES, 8, 1.0, packed=True).statistics
    # seven of eight bytes twice: of five pairs of ten numbers, and of 15 and 6
    assert packed == 2 * 7 / 8 * 4 * 121
    for bits, words in ((16, 61), (10, 41), (8, 31)):
        found = costs(SHAPES, 8, 1.0, statistics_bits=bits).statistics
        assert found == 2 * 7 / 8 * 4 * (words + 2)


@pytest.mark.parametrize("words", [["--devices", "0"], ["--inverse-every", "0"]])
def test_numbers_below_one_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "expected a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["{}", "[]", "[[1, 2]]", "[[1, 2, 0]]", "[[1, 2, 2.5]]", "[[1, 2, true]]"]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "layers.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"expected .*\[copies, p, q\]"):
        read_layers(str(path))
