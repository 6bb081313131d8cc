"""A FermiNet and its Monte Carlo against closed forms; what training makes of helium; the command."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import kfac_optax as ko
from kfac_optax.experiments import ferminet, vmc, wavefunction
from tests import oracles
from tests.experiments.conftest import read_config

ROOT = Path(__file__).parents[2]
LITHIUM = ferminet.Atom(3, 2, 1)
TINY = ferminet.Widths(one=5, two=3, depth=2, determinants=2)


def lithium(walkers=3):
    params = ferminet.init(jax.random.key(0), LITHIUM, TINY)
    params = jax.tree.map(lambda v: v.astype(jnp.float64), params)
    return params, oracles.normal(1, (walkers, 3, 3))


def test_electrons_of_one_spin_are_antisymmetric(x64):
    params, x = lithium()
    run = jax.jit(functools.partial(ferminet.log_psi, atom=LITHIUM))
    sign, log = run(params, x)
    swapped_sign, swapped = run(params, x[:, jnp.array([1, 0, 2])])
    np.testing.assert_allclose(swapped, log, rtol=1e-12)
    np.testing.assert_array_equal(swapped_sign, -sign)
    _, other = run(params, x[:, jnp.array([2, 1, 0])])  # of different spins: another function
    assert np.abs(other - log).min() > 1e-3


def test_every_parameter_is_in_a_layer(x64):
    """Rows of electrons, of pairs, and of the electrons of one spin."""
    params, x = lithium()
    predict = lambda p, x: ko.LogAmplitude(ferminet.log_psi(p, x, LITHIUM)[1])
    layers = ko.ggn(predict).layers(params, x)
    assert layers.uncovered == ()
    rows = {layer.path: layer.rows // len(x) for layer in layers}
    assert rows == {
        "layers/0/one": 3,
        "layers/0/two": 9,
        "layers/1/one": 3,
        "up/orbitals": 2,
        "up/decay": 2,
        "down/orbitals": 1,
        "down/decay": 1,
    }


def test_electrons_that_ignore_each_other_have_the_energy_of_hydrogen(x64):
    """`psi = exp(-Z sum r)` is exact but for the repulsion: `-Z^2 / 2` each, everywhere."""
    x = oracles.normal(0, (5, 2, 3))
    log_psi = lambda x: -3.0 * jnp.sum(jnp.linalg.norm(x, axis=-1), -1)
    got = jax.jit(functools.partial(vmc.local_energies, log_psi, charge=3.0))(x)
    repulsion = 1 / np.linalg.norm(x[:, 0] - x[:, 1], axis=-1)
    np.testing.assert_allclose(got, repulsion - 9.0, rtol=1e-10)


def test_local_energies_are_those_of_the_dense_hessian(x64):
    params, x = lithium()
    log = lambda x: ferminet.log_psi(params, x, LITHIUM)[1]

    @jax.jit
    @jax.vmap
    def dense(x):
        flat = lambda v: log(v.reshape(3, 3))
        gradient, hessian = jax.grad(flat)(x.ravel()), jax.hessian(flat)(x.ravel())
        return -0.5 * (jnp.trace(hessian) + gradient @ gradient)

    got = jax.jit(lambda x: vmc.local_energies(log, x, 3.0) - vmc.potential(x, 3.0))(x)
    np.testing.assert_allclose(got, dense(x), rtol=1e-9)
    r = np.linalg.norm(x, axis=-1)
    apart = [np.linalg.norm(x[:, i] - x[:, j], axis=-1) for i, j in ((0, 1), (0, 2), (1, 2))]
    want = sum(1 / d for d in apart) - 3 * np.sum(1 / r, 1)
    np.testing.assert_allclose(vmc.potential(x, 3.0), want, rtol=1e-12)


def test_walkers_sample_the_square_of_the_wave_function():
    """Of `exp(-2 r)` in space the mean radius is `3 / 4`."""
    log_psi = lambda x: -2.0 * jnp.linalg.norm(x, axis=-1)[:, 0]
    walkers = vmc.Walkers(jax.random.normal(jax.random.key(0), (4096, 1, 3)), jnp.float32(0.5))
    step = jax.jit(functools.partial(vmc.move, log_psi, moves=50))
    for i in range(6):
        walkers, share = step(walkers, jax.random.key(i))
    radius = np.linalg.norm(walkers.x, axis=-1)
    error = radius.std() / np.sqrt(len(radius))
    assert abs(radius.mean() - 0.75) < 5 * error < 0.05
    assert 0.3 < share < 0.8


def small(**changes):
    config = read_config("helium")
    config.update(seeds=2, walkers=64, steps=40, burn_in=10, evaluations=20, points=4, moves=3)
    config.network = {"one": 6, "two": 3, "depth": 1, "determinants": 1}
    config.grid = {"kfac": (), "adam": (1e-2, 1e-3)}
    config.update(changes)
    return config


def test_kfac_finds_helium():
    """Two independent electrons in the best orbital have -2.848; the energy is an upper bound."""
    config = small(walkers=256, steps=300, moves=5)
    train = jax.jit(functools.partial(vmc.train, config, vmc.METHODS["kfac"]))
    found = train(jnp.float32(0.1), jax.random.key(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    first, last = found.log.energy[0], found.log.energy[-40:].mean()
    assert last < -2.848 < first
    assert last > config.exact - 0.05
    assert found.log.deviation[-40:].mean() < 0.5 * found.log.deviation[0]


def test_spring_descends_in_twenty_steps():
    """The exact natural gradient of all walkers, with local energies as its residual."""
    config = small(walkers=128, steps=20, moves=5)
    train = jax.jit(functools.partial(vmc.train, config, vmc.METHODS["spring"]))
    found = train(jnp.float32(0.2), jax.random.key(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    energy, deviation = found.log.energy, found.log.deviation
    assert energy[-5:].mean() < energy[:5].mean() - 0.1
    assert deviation[-5:].mean() < deviation[:5].mean()


def test_the_command_leaves_its_files(tmp_path):
    command = [sys.executable, "-m", "kfac_optax.experiments.wavefunction"]
    command += ["--config=configs/helium.py", f"--config.out={tmp_path}", "--config.seeds=2"]
    command += ["--config.walkers=16", "--config.steps=8", "--config.burn_in=2"]
    command += ["--config.evaluations=20", "--config.points=4", "--config.network.depth=1"]
    command += ["--config.moves=2", "--config.grid.kfac=()", "--config.grid.adam=(1e-2, 1e-3)"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "energy after 8 steps, exact -2.903724" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {
        "curves.csv",
        "summary.csv",
        "summary.json",
        "energy.png",
    }
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 2 * 2 * 4
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert len(runs) == 4 and {run["optimizer"] for run in runs} == {"adam"}
    assert len({run["learning_rate"] for run in runs if run["best"]}) == 1


def test_tables_compare_all_rates():
    config = small()
    make = lambda above: [
        wavefunction.Run(s, np.full(4, -2.9), np.ones(4), -2.903724 + above * (1 + s), 1e-4, 0.1, 2)
        for s in range(2)
    ]
    runs = {("kfac", 0.1): make(1e-3), ("adam", 1e-2): make(3e-3), ("adam", 1e-3): make(2e-3)}
    assert wavefunction.best_rates(runs) == {"kfac": 0.1, "adam": 1e-3}
    console = Console(width=150, force_terminal=False)
    with console.capture() as capture:
        console.print(wavefunction.table(config, runs))
    rows = [line.split() for line in capture.get().splitlines()]
    row = "K-FAC 0.1 -2.90222 1.50 ± 6.35 2.00 0.10 0.100 2.0 ± 0.0"
    assert row.split() in rows


@pytest.mark.parametrize("name", ["helium", "lithium"])
def test_settings_are_whole(name):
    config = read_config(name)
    wavefunction.validate(config)
    atom = ferminet.Atom(**config.atom)
    assert atom.charge == atom.electrons
    layers = jax.eval_shape(
        lambda key: ferminet.init(key, atom, ferminet.Widths(**config.network)), jax.random.key(0)
    )
    assert set(layers) == {"layers", "up", "down"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"walkers": 0}, "config.walkers: got 0, expected a positive number"),
        ({"steps": 41}, "config.steps: got 41, expected a multiple of 4"),
        ({"evaluations": 30}, "config.evaluations: got 30, expected a multiple of 20"),
        ({"grid": {"sgd": (1.0,)}}, "config.grid: got 'sgd', expected one of"),
        ({"grid": {"adam": ()}}, "config.grid: got no rates, expected some"),
        ({"grid": {"adam": (0.0,)}}, "config.grid.adam: got .0.0,., expected positive"),
    ],
)
def test_bad_settings_are_refused(change, message):
    config = small()
    if "grid" in change:
        config.grid = change.pop("grid")
    config.update(change)
    with pytest.raises(ValueError, match=message):
        wavefunction.compare(config, Console())
