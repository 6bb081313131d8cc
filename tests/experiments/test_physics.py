"""Equations and their solutions, the loss and its curvature, the command and its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from rich.console import Console

import kfac_optax as ko
from kfac_optax.experiments import equations, jets, physics, physics_report, pinn
from tests.experiments.conftest import read_config

ROOT = Path(__file__).parents[2]
CASES = [("poisson_sines", 2), ("poisson_cosines", 5), ("heat", 2)]


def jet_of(function, x, times):
    """By automatic differentiation, point by point."""
    one = lambda point: function(point[None])[0]
    second = jax.vmap(jax.hessian(one))(x)[:, times:, times:]
    slopes = jax.vmap(jax.grad(one))(x)[..., None]
    return jets.Jet(function(x)[:, None], slopes, jnp.trace(second, axis1=1, axis2=2)[:, None])


@pytest.mark.parametrize(("name", "dimensions"), CASES)
def test_the_solutions_solve_their_equations(name, dimensions, x64):
    equation = equations.EQUATIONS[name](dimensions)
    x = equations.inside(jax.random.key(0), 5, equation, jnp.float64)
    jet = jax.jit(lambda x: jet_of(equation.solution, x, equation.times))(x)
    np.testing.assert_allclose(equation.residual(jet, x), 0, atol=1e-11)
    other = jet._replace(laplacian=jet.laplacian + 1)
    assert np.abs(equation.residual(other, x)).min() > 0.2


@pytest.mark.parametrize(("name", "dimensions"), CASES)
def test_values_are_given_on_the_faces_but_not_at_the_end_of_time(name, dimensions):
    equation = equations.EQUATIONS[name](dimensions)
    x = np.asarray(equations.boundary(jax.random.key(0), 400, equation, jnp.float32))
    assert ((x >= 0) & (x <= 1)).all()
    low, high = (x == 0).mean(0), (x == 1).mean(0)
    np.testing.assert_allclose(low.sum() + high.sum(), 1)  # one face for every point
    assert low.min() > 0.05
    assert (high[: equation.times] == 0).all()
    assert high[equation.times :].min() > 0.05


def test_poisson_is_zero_on_the_boundary_where_it_should_be():
    equation = equations.poisson_sines(2)
    x = equations.boundary(jax.random.key(0), 50, equation, jnp.float32)
    np.testing.assert_allclose(equation.solution(x), 0, atol=1e-6)


def small(name="poisson", **changes):
    config = read_config(name)
    config.update(
        seeds=2, widths=(4,), inside_points=9, boundary_points=9, test_points=20, report_every=2
    )
    config.steps = dict.fromkeys(config.steps, 4)
    config.grid = changes.pop("grid", {"kfac_equations_adaptive": (1.0,)})
    config.update(changes)
    return config


def test_the_gauss_newton_matrix_is_that_of_the_loss(x64):
    config = small(boundary_points=5)
    equation, batch = pinn.equation_of(config), pinn.draw(config, jax.random.key(0))
    params = jets.init(jax.random.key(1), (2, 3, 1), jnp.float64)
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def compute(flat):
        each = lambda flat: pinn.residuals(equation, unravel(flat), batch)
        grad = jax.grad(lambda flat: pinn.loss_of(equation, unravel(flat), batch))(flat)
        estimator = ko.ggn(pinn.predictor(equation))
        product = estimator.vector_product(unravel(flat), unravel(jnp.ones_like(flat)), batch)
        return each(flat), jax.jacrev(each)(flat), grad, ravel_pytree(product)[0]

    values, jacobians, grad, product = compute(flat)
    means = [np.asarray(j).T @ np.asarray(r) / len(r) for r, j in zip(values, jacobians)]
    np.testing.assert_allclose(grad, sum(means), rtol=1e-9)
    exact = sum(np.asarray(j).T @ np.asarray(j) / len(j) for j in jacobians)
    np.testing.assert_allclose(product, exact.sum(1), rtol=1e-9)


@pytest.mark.parametrize("name", ["kfac_equations_adaptive", "kfac", "natural_adaptive"])
def test_natural_gradients_solve_the_heat_equation(name):
    """Single precision and few points: far below the start, and below a loss of zero slope."""
    config = small("heat", widths=(8, 8), inside_points=40, boundary_points=20, float64=False)
    config.steps[name], config.report_every = 60, 20
    run = pinn.train(config, name, pinn.prepare(config, name), 1.0, seed=0)
    assert run.steps.tolist() == [0, 20, 40, 60]
    assert (np.diff(run.seconds) > 0).all() and run.seconds[0] == 0
    assert run.loss[-1] < 1e-2 * run.loss[0]
    assert run.error[-1] < 0.2 < run.error[0]


def test_the_command_leaves_its_files(tmp_path):
    command = [
        sys.executable,
        "-m",
        "kfac_optax.experiments.physics",
        "--config=configs/poisson.py:5d",
        f"--config.out={tmp_path}",
        "--config.seeds=2",
        "--config.widths=(4,)",
        "--config.inside_points=8",
        "--config.test_points=20",
        "--config.report_every=2",
        "--config.steps.adam=4",
        "--config.grid.adam=(1e-2, 1e-3)",
    ]
    others = [name for name in read_config("poisson").grid if name != "adam"]
    command += [f"--config.grid.{name}=()" for name in others]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "Adam, rate 0.01" in done.stdout and "left" in done.stdout
    assert "relative L2 error" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"curves.csv", "summary.json", "errors.png"}
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    summary = json.loads((tmp_path / "summary.json").read_text())["summary"]
    assert [row["learning_rate"] for row in summary] == [0.01, 0.001]
    assert all(0 < error < 10 for row in summary for error in row["errors"])


def fake_run(level, slow=1.0):
    errors = level * np.array([1.0, 0.1, 0.01])
    return pinn.History(np.array([0, 2, 4]), slow * np.arange(3.0), errors, errors)


def test_the_table_compares_best_rates_at_equal_steps_and_seconds():
    config = small(grid={"adam": (1e-2, 1e-3), "kfac": (1.0,)})
    runs = {
        ("adam", 1e-2): [fake_run(1.0), fake_run(3.0)],
        ("adam", 1e-3): [fake_run(np.nan), fake_run(5.0)],
        ("kfac", 1.0): [fake_run(1e-3, slow=2.0), fake_run(1e-3, slow=2.0)],
    }
    assert physics_report.best_rates(runs) == {"adam": 1e-2, "kfac": 1.0}
    assert physics_report.common(runs) == (4, 2.0)
    console = Console(width=150, force_terminal=False)
    with console.capture() as capture:
        console.print(physics_report.table(config, runs))
    rows = [" ".join(line.split()) for line in capture.get().splitlines()]
    adam, seconds = "2.0e-02 / 3.0e-02", "1.0e-04 / 1.0e-04"
    assert f"Adam 0.01* {adam} {adam} {adam} 4 2.0 500.0" in rows
    assert f"K-FAC own 1.0e-05 / 1.0e-05 {seconds} 1.0e-05 / 1.0e-05 4 4.0 1000.0" in rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "config.seeds: got 0, expected a positive number"),
        ({"equation": "wave"}, "config.equation: got 'wave', expected one of"),
        ({"grid": {"sgd": (1.0,)}}, "config.grid: got 'sgd', expected one of"),
        ({"grid": {"adam": ()}}, "got no rates, expected some for at least one optimizer"),
        ({"grid": {"adam": (0.0,)}}, "config.grid.adam: got .0.0,., expected positive"),
        ({"report_every": 3}, "got 4, expected a multiple of report_every = 3"),
        (
            {"boundary_points": 5, "grid": {"two_level": (1.0,)}},
            r"expected as many boundary_points \(5\) as inside_points \(9\)",
        ),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        physics.compare(small(**change), Console())


def test_unknown_variants_are_refused():
    assert read_config("poisson", "5d").dimensions == 5
    with pytest.raises(ValueError, match="got '3d', expected '2d' or '5d'"):
        read_config("poisson", "3d")
