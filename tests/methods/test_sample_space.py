"""Natural gradient in sample space against dense solves, and the identities of its relatives."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfac_optax as ko
from tests import oracles

N, DAMPING = 5, 0.03
ravel = lambda tree: np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def _net(params, x):
    return oracles.forward(params, x)[0]


def _classes(params, x):
    return ko.Categorical(_net(params, x), weights=jnp.array([1.0, 2.0, 0.0, 1.0, 0.5]))


def _losses(params, x):
    return ko.Categorical(_net(params, x)).nll(jnp.arange(len(x)) % 3)


@pytest.fixture
def problem(x64):
    """Parameters, inputs, and a gradient that is none of this batch's."""
    params, x = oracles.make_params(0, (4, 3, 3)), oracles.normal(1, (N, 4))
    return params, x, oracles.make_params(2, (4, 3, 3))


def _dense_fisher(curvature, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = lambda e: jax.flatten_util.ravel_pytree(curvature.vector_product(unravel(e)))[0]
    return np.asarray(jax.jit(jax.vmap(product))(jnp.eye(flat.size)))


def _natural(fisher, gradient, damping=DAMPING):
    return np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient)


def _step(tx, curvature):
    """A compiled update of this batch."""
    return jax.jit(lambda g, s, **more: tx.update(g, s, g, curvature=curvature, **more))


def _update(tx, gradient, curvature, **more):
    return _step(tx, curvature)(gradient, tx.init(gradient), **more)


def _curvatures(params, x):
    return {
        "classes": ko.ggn(_classes).at(params, x),
        "losses": ko.empirical_fisher(_losses).at(params, x),
    }


@pytest.mark.parametrize("rows", [False, True], ids=["products", "rows"])
@pytest.mark.parametrize("name", ["classes", "losses"])
def test_it_is_the_dense_damped_solve(name, rows, problem):
    """Also where the output Fisher is singular (classes), for a gradient outside of the rows."""
    params, x, gradient = problem
    curvature = _curvatures(params, x)[name]
    layers = ko.ggn(_classes).layers(params, x) if rows else None
    got, state = _update(ko.smw(layers, damping=DAMPING, chunk=3), gradient, curvature)
    expected = _natural(_dense_fisher(curvature, params), ravel(gradient))
    np.testing.assert_allclose(ravel(got), expected, rtol=1e-9)
    assert state.solve_error < 1e-9
    assert state.skipped_steps == 0


def test_a_residual_gives_the_step_of_its_gradient(problem):
    """minSR: `J^T (K + damping)^-1 r` is `(F + damping)^-1 J^T r`, by pushing `J^T` through."""
    params, x, other = problem
    for curvature in _curvatures(params, x).values():
        jacobian = curvature.linearize()
        shapes = jax.eval_shape(jacobian.jvp, params)
        residual = [oracles.normal(3 + i, s.shape) for i, s in enumerate(shapes)]
        gradient = jax.tree.map(lambda v: v / N, jacobian.vjp(residual))
        tx = ko.smw(damping=DAMPING)
        expected, _ = _update(tx, gradient, curvature)
        got, state = _update(tx, other, curvature, residual=residual)
        np.testing.assert_allclose(ravel(got), ravel(expected), rtol=1e-9)
        assert state.solve_error < 1e-9


def test_one_example(problem):
    """A kernel of one number: `(g - u (u^T g) / (damping + u^T u)) / damping`."""
    params, x, gradient = problem
    curvature = ko.empirical_fisher(_losses).at(params, x[:1])
    got, _ = _update(ko.smw(damping=DAMPING), gradient, curvature)
    u, g = ravel(jax.grad(lambda p: _losses(p, x[:1])[0])(params)), ravel(gradient)
    np.testing.assert_allclose(ravel(got), (g - u * (u @ g) / (DAMPING + u @ u)) / DAMPING)


def test_large_damping_leaves_the_gradient(problem):
    params, x, gradient = problem
    tx = ko.smw(damping=1e9)
    for curvature in _curvatures(params, x).values():
        got, _ = _update(tx, gradient, curvature)
        np.testing.assert_allclose(ravel(got), ravel(gradient) / 1e9, rtol=1e-7)


def _linear(params, x):
    return ko.Normal(ko.tap_dense(x @ params["w"], x, params["w"]))


def test_linear_least_squares_takes_one_step(x64):
    """Fewer examples than weights: the smallest weights that interpolate; more: the least squares."""
    for examples, inputs in ((3, 6), (8, 4)):
        x, y = oracles.normal(0, (examples, inputs)), oracles.normal(1, (examples, 2))
        params = {"w": jnp.zeros((inputs, 2))}
        gradient = jax.grad(lambda p: _linear(p, x).mean_nll(y))(params)
        curvature = ko.ggn(_linear).at(params, x)
        expected = np.linalg.pinv(x) @ y
        step, _ = _update(ko.smw(damping=0.0, cutoff=1e-7), gradient, curvature)
        np.testing.assert_allclose(-step["w"], expected, atol=1e-10)


def test_gram_gauss_newton_interpolates_in_one_step(x64):
    """From residuals the damping may be as good as none: the kernel alone has to be regular."""
    x, y = oracles.normal(0, (3, 6)), oracles.normal(1, (3, 2))
    start = {"w": oracles.normal(2, (6, 2))}
    curvature, residual = ko.ggn(_linear).at(start, x), x @ start["w"] - y
    step, _ = _update(ko.smw(damping=0.0), start, curvature, residual=residual)
    np.testing.assert_allclose(x @ (start["w"] - step["w"]), y, rtol=1e-10, atol=1e-10)
    inside = np.linalg.pinv(x) @ x  # the step is the shortest that does it
    np.testing.assert_allclose(inside @ step["w"], step["w"], rtol=1e-10, atol=1e-10)


def test_a_damped_pseudo_inverse_leaves_out_what_is_outside_of_the_rows(problem):
    params, x, gradient = problem
    curvature = ko.empirical_fisher(_losses).at(params, x)
    got, _ = _update(ko.smw(damping=DAMPING, cutoff=1e-9), gradient, curvature)
    fisher = _dense_fisher(curvature, params)
    inside = np.linalg.pinv(fisher, rcond=1e-10) @ fisher
    expected = inside @ _natural(fisher, ravel(gradient))
    np.testing.assert_allclose(ravel(got), expected, rtol=1e-7, atol=1e-9)


def test_a_reparametrisation_changes_nothing_without_damping(x64):
    """With `w = A v` the step in `v` moves the predictions as that in `w` does."""
    x, y, a = oracles.normal(0, (4, 6)), oracles.normal(1, (4, 2)), oracles.normal(2, (6, 6))
    a = a + 3 * jnp.eye(6)
    moved = []
    for inputs in (x, x @ a):
        params = {"w": jnp.zeros((6, 2))}
        gradient = jax.grad(lambda p, i=inputs: _linear(p, i).mean_nll(y))(params)
        tx = ko.smw(damping=0.0, cutoff=1e-9)
        step, _ = _update(tx, gradient, ko.ggn(_linear).at(params, inputs))
        moved.append(inputs @ step["w"])
    np.testing.assert_allclose(*moved, rtol=1e-8, atol=1e-10)


def test_spring_is_its_recursion(problem):
    """`phi <- mu phi + J^T (J J^T + damping)^-1 (r - mu J phi)`, from residuals and gradients."""
    params, x, _ = problem
    curvature = ko.empirical_fisher(_losses).at(params, x)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    j = np.asarray(jax.jacrev(lambda v: _losses(unravel(v), x))(flat)) / np.sqrt(N)
    tx = ko.spring(learning_rate=1.0, damping=DAMPING, momentum=0.9, norm_constraint=None)
    states, phi, update_of = [tx.init(params)] * 2, np.zeros(j.shape[1]), _step(tx, curvature)
    for step in range(3):
        residual = oracles.normal(step, (N,))
        r = np.asarray(residual) / np.sqrt(N)
        kernel = j @ j.T + DAMPING * np.eye(N)
        phi = 0.9 * phi + j.T @ np.linalg.solve(kernel, r - 0.9 * j @ phi)
        gradient = unravel(j.T @ r)
        for i, more in enumerate(({}, {"residual": [residual]})):
            update, states[i] = update_of(gradient, states[i], **more)
            np.testing.assert_allclose(-ravel(update), phi, rtol=1e-9, atol=1e-12)


def test_spring_without_momentum_is_the_natural_gradient(problem):
    params, x, gradient = problem
    curvature = ko.ggn(_classes).at(params, x)
    natural, _ = _update(ko.smw(damping=DAMPING), gradient, curvature)
    plain = ko.spring(learning_rate=0.1, damping=DAMPING, momentum=0.0, norm_constraint=None)
    state, update_of = plain.init(params), _step(plain, curvature)
    for _ in range(2):
        got, state = update_of(gradient, state)
        np.testing.assert_allclose(ravel(got), -0.1 * ravel(natural), rtol=1e-12)
    bound = ko.spring(learning_rate=0.1, damping=DAMPING, momentum=0.0, norm_constraint=1e-4)
    got, _ = _update(bound, gradient, curvature)
    np.testing.assert_allclose(np.linalg.norm(ravel(got)), 1e-2, rtol=1e-10)


def test_a_batch_without_examples_or_numbers_is_left_out(problem):
    params, x, gradient = problem
    empty = lambda p, x: ko.Categorical(_net(p, x), weights=jnp.zeros(N))
    tx = ko.spring(learning_rate=1.0, damping=DAMPING)
    _, first = _update(tx, gradient, ko.ggn(_classes).at(params, x))
    for number, (predict, scale) in enumerate(((empty, 1.0), (_classes, jnp.nan)), 1):
        curvature = ko.ggn(predict).at(params, scale * x)
        update, state = _step(tx, curvature)(gradient, first)
        assert not ravel(update).any()
        assert state[0].skipped_steps == 1, number
        np.testing.assert_array_equal(
            ravel(state[0].previous_update), ravel(first[0].previous_update)
        )


def test_masked_parameters_have_no_part_in_the_metric(problem):
    """The metric of what is left is the block of the Fisher that belongs to it."""
    params, x, gradient = problem
    curvature = ko.ggn(_classes).at(params, x)
    mask = jax.tree.map(lambda _: False, params) | {"layer1": {"kernel": True, "bias": True}}
    tx = optax.masked(ko.smw(damping=DAMPING), mask)
    got, _ = _update(tx, gradient, curvature)
    mine = np.arange(len(ravel(gradient)))[len(ravel(params["layer0"])) :]
    block = _dense_fisher(curvature, params)[np.ix_(mine, mine)]
    expected = _natural(block, ravel(gradient["layer1"]))
    np.testing.assert_allclose(ravel(got["layer1"]), expected, rtol=1e-9)
    np.testing.assert_array_equal(ravel(got["layer0"]), ravel(gradient["layer0"]))


def test_single_precision_is_refined():
    """The difference that Woodbury's formula takes loses digits; one refinement brings them back."""
    params = jax.tree.map(jnp.float32, oracles.make_params(0, (4, 8, 3)))
    x, y = jnp.float32(oracles.normal(1, (N, 4))), jnp.arange(N) % 3
    predict = lambda p, x: ko.Categorical(3 * _net(p, x))
    curvature = ko.ggn(predict).at(params, x)
    gradient = jax.grad(lambda p: predict(p, x).mean_nll(y))(params)
    errors = []
    for refine in (0, 1):
        tx = ko.smw(damping=1e-4, refine=refine)
        errors.append(float(_update(tx, gradient, curvature)[1].solve_error))
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 1e-3


def _centred(params, x):
    """Examples interact: most of the mean over the batch is taken off."""
    out = _net(params, x)
    return ko.Normal(3 * (out - 0.7 * out.mean(0)))


def test_examples_that_interact_are_seen(problem):
    """Products with `J` know of them, rows of layers do not: the solve says so."""
    params, x, _ = problem
    estimator = ko.ggn(_centred)
    curvature = estimator.at(params, x)
    gradient = jax.grad(lambda p: _centred(p, x).mean_nll(jnp.ones((N, 3))))(params)
    got, state = _update(ko.smw(damping=DAMPING), gradient, curvature)
    expected = _natural(_dense_fisher(curvature, params), ravel(gradient))
    np.testing.assert_allclose(ravel(got), expected, rtol=1e-8, atol=1e-12)
    assert ko.problems(state) == []
    _, state = _update(ko.smw(estimator.layers(params, x), damping=DAMPING), gradient, curvature)
    assert state.inexact_solves == 1
    assert "examples that interact" in ko.problems(state)[0]


def test_damping_is_adapted_around_it(problem):
    """Levenberg-Marquardt: the damping in the kernel is that of the model."""
    params, x, _ = problem
    y = jnp.arange(N) % 3
    loss = lambda p: _classes(p, x).mean_nll(y)
    model = optax.chain(ko.smw(), ko.quadratic_step())
    tx = ko.adapt_damping(model, initial_damping=1.0, every=1, decay=0.5)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        known = {"curvature": ko.ggn(_classes).at(params, x), "value": value, "value_fn": loss}
        updates, state = tx.update(gradient, state, params, **known)
        return optax.apply_updates(params, updates), state

    state, first = tx.init(params), loss(params)
    fisher = _dense_fisher(ko.ggn(_classes).at(params, x), params)
    stepped, _ = step(params, state)
    direction = _natural(fisher, ravel(jax.grad(loss)(params)), damping=1.0)
    moved = ravel(params) - ravel(stepped)  # the model's own minimum lies one step along it
    np.testing.assert_allclose(moved, direction, rtol=1e-8, atol=1e-12)
    for _ in range(15):
        params, state = step(params, state)
    assert state.model_damping < 0.1
    assert loss(params) < 0.01 * first


def test_wrong_use_says_what_to_do(problem):
    params, x, gradient = problem
    curvature = ko.ggn(_classes).at(params, x)

    def trace(curvature, residual=None, **words):
        tx = ko.smw(**words)
        jax.eval_shape(
            lambda g: tx.update(g, tx.init(g), g, curvature=curvature, residual=residual), gradient
        )

    with pytest.raises(ValueError, match="got no `curvature`"):
        trace(None)
    with pytest.raises(ValueError, match=r"without linearize\(\)"):
        trace(object())
    with pytest.raises(ValueError, match=r"shapes \[\(5,\)\]; expected \[\(5, 3\)\]"):
        trace(curvature, jnp.ones(N))
    with pytest.raises(ValueError, match=r"damping=0.*cutoff= .*or residual="):
        trace(curvature, damping=0.0)
    with pytest.raises(ValueError, match="cutoff"):
        ko.smw(cutoff=0.0)
    with pytest.raises(ValueError, match="norm_constraint"):
        ko.spring(learning_rate=0.1, norm_constraint=-1.0)
    with pytest.raises(TypeError, match="complex64"):
        ko.smw().init({"w": jnp.ones(2, jnp.complex64)})
