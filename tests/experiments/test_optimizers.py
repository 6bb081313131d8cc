"""The compared optimizers: those of the catalogue, and the options of a configuration they take."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import kfac_optax as ko
from kfac_optax.experiments import plots, results, settings, steps, train
from kfac_optax.experiments.averages import average_of_finite
from kfac_optax.experiments.compared import OF_OPTAX
from kfac_optax.experiments.optimizers import OPTIMIZERS, Curved
from tests import helpers
from tests.experiments.conftest import read_config

CONFIG = ml_collections.ConfigDict({"weight_decay": 0.0, "momentum": 0.9})
OPTIONS = dict(damping=1e-2, kl_clip=1e-3, curvature_every=5, inverse_every=20, inverse="eigh")


@pytest.mark.parametrize("name", ["eva_s", "ekfac", "tkfac", "tekfac", "kpsvd", "kpsvd_two"])
def test_built_of_a_configuration(name):
    problem = helpers.plain_problem()
    optimizer = OPTIMIZERS[name]
    curved = Curved(problem.layers, OPTIONS) if optimizer.curvature else None
    state = jax.eval_shape(optimizer.build(CONFIG, curved, 0.1).init, problem.params)
    assert jax.tree.leaves(state)


@functools.cache
def small_family():
    config = read_config("family", "digits")
    config.update(batch_size=8, epochs=1)
    config.data.update(train=16, test=4)
    config.model.widths = ()  # one layer: tracing is all the time of these tests
    config.low_rank.rank = 2
    return config, *train.start(config, seed=0)


def one_step(name):
    """The step of an optimizer on a tiny problem, and its arguments."""
    config, dataset, key = small_family()
    config = settings.of(config, name)
    problem = steps.problem(config, name, dataset)
    state = functools.partial(steps.init, problem, jnp.float32(0.1), key, dataset)

    def step(state, due):
        reports = steps.no_reports(problem)
        epoch = steps.shuffle(problem, state.key, len(dataset.train_x))
        one = (problem, jnp.float32(0.1), state, reports, dataset, epoch, 0)
        return steps.train_one(*one, **due)

    due = {} if problem.method.due is None else problem.method.due(0)
    return state, functools.partial(step, due=due)


@pytest.mark.parametrize("name", [*ko.CATALOGUE, "kfra", "adamw", "lion", "kl_shampoo", "kl_soap"])
def test_every_method_of_the_catalogue_takes_a_step(name):
    """Traced: nothing runs, but all that its update needs is there, and the state stays as it is."""
    start, step = one_step(name)
    state = jax.eval_shape(start)
    after, reports = jax.eval_shape(step, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert reports.shape == (2, 2)


def test_methods_of_gradients_alone_are_given_nothing_else():
    """Their presets with what they do by default; no curvature is measured for them."""
    alone = [name for name, record in ko.CATALOGUE.items() if record.needs == {"gradient"}]
    assert {"shampoo", "soap", "eva_s", "jorge", "mfac"} <= set(alone)
    config, dataset, _ = small_family()
    for name in alone:
        method = steps.problem(config, name, dataset).method
        assert method.extra({}, {}, None, None, value_fn=abs) == {} and method.due is None
        assert "kfac" not in results.run_settings(config, results.Job(name, 0.1, 0))
    method = steps.problem(config, "adahessian", dataset).method
    assert method.extra({}, {}, None, None, value_fn=abs) == {"value_fn": abs}


def test_a_preset_of_gradients_alone_is_that_of_the_library():
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    made, own = OPTIMIZERS["soap"].build(CONFIG, None, 0.1), ko.soap(0.1)
    updates, _ = made.update(params, made.init(params), params)
    expected, _ = own.update(params, own.init(params), params)
    np.testing.assert_array_equal(updates["w"], expected["w"])


def test_gradients_are_taken_at_draws_where_a_posterior_is_followed():
    config, dataset, _ = small_family()
    followed = {name for name in ko.CATALOGUE if OPTIMIZERS[name].drawn is not None}
    assert followed == {"noisy_kfac", "vadam", "vogn"}
    method = steps.problem(config, "vadam", dataset).method
    params = {"w": jnp.ones(100)}
    tx = method.transform(0.1)
    _, state = tx.update(params, tx.init(params), params)
    # s = 1 after the first gradient, a weight decay of t / (N v) = 1 / 16 on 16 examples
    assert config.posterior.to_dict() == {"temperature": 1e-2, "variance": 1e-2}
    spread = jnp.std(method.drawn(params, state, jax.random.key(0))["w"])
    np.testing.assert_allclose(spread, (1e-2 / 16 / (1 + 1 / 16)) ** 0.5, rtol=0.2)


def test_a_section_of_a_posterior_may_be_a_part_of_it_but_nothing_else():
    config, dataset, _ = small_family()
    config = config.copy_and_resolve_references()
    config.posterior = {"temperature": 0.25}
    method = steps.problem(config, "vadam", dataset).method
    params = {"w": jnp.ones(100)}
    tx = method.transform(0.1)
    _, state = tx.update(params, tx.init(params), params)
    spread = jnp.std(method.drawn(params, state, jax.random.key(0))["w"])
    # t / (N (s + w)) with s = 1 and w = t / N, of a prior of variance one
    np.testing.assert_allclose(spread, (0.25 / 16 / (1 + 0.25 / 16)) ** 0.5, rtol=0.2)
    for wrong in ({"variance": 0.0}, {"temprature": 0.5}):
        config.posterior = wrong
        with pytest.raises(ValueError, match=rf"config.posterior.{next(iter(wrong))}: got"):
            steps.problem(config, "vadam", dataset)
    config.posterior, config.weight_decay = {"variance": 0.01}, 1e-3
    with pytest.raises(ValueError, match="variance: got 0.01 beside config.weight_decay=0.001"):
        steps.problem(config, "vadam", dataset)


@pytest.mark.parametrize("name", ["ggt", "adahessian", "tonga"])
def test_there_is_one_momentum(name):
    """Of the preset, where it averages gradients itself; else that of the configuration."""
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    behind = OPTIMIZERS[name].momentum == "behind"
    assert behind == (name == "tonga")
    tx, words = (
        OPTIMIZERS[name].build(CONFIG, None, 0.1),
        {"value_fn": lambda p: jnp.sum(p["w"] ** 4)},
    )
    alone = optax.chain(getattr(ko, name)(), optax.sgd(0.1, momentum=0.9 if behind else None))
    states = [tx.init(params), alone.init(params)]
    for i in range(2):
        gradient = jax.tree.map(lambda x, i=i: jnp.sin(x + i), params)
        mine, states[0] = tx.update(gradient, states[0], params, **words)
        other, states[1] = alone.update(gradient, states[1], params, **words)
        np.testing.assert_array_equal(mine["w"], other["w"])
    said = results.run_settings(small_family()[0], results.Job(name, 0.1, 0))
    assert ("momentum" in said) == behind  # what has no influence is no part of a run


def test_gradients_of_k_bfgs_are_averaged_before_it():
    """As its authors do: behind its step comes the second pass."""
    config, dataset, _ = small_family()
    state = steps.problem(config, "k_bfgs_l", dataset).method.transform(0.1).init
    params = {"Dense_0": {"kernel": jnp.ones((64, 10)), "bias": jnp.ones(10)}}
    assert isinstance(jax.eval_shape(state, params)[0], optax.EmaState)
    said = results.run_settings(config, results.Job("k_bfgs_l", 0.1, 0))
    assert said["average"] == config.momentum and "momentum" not in said


def test_options_of_a_section_are_for_methods_of_its_kind():
    """Nor do they say anything about runs of the others."""
    config, _, _ = small_family()
    for name in ("smw", "spring", "kfac", "rs_kfac"):
        said = results.run_settings(config, results.Job(name, 0.1, 0))
        assert ("sample_space" in said) == (name in ("smw", "spring"))
        assert ("low_rank" in said) == (name == "rs_kfac")
        assert "mfac" not in said
    # a row of J for each example: the kernel has no other size in the program of a step
    start, step = one_step("smw")
    text = str(jax.make_jaxpr(step)(jax.eval_shape(start)))
    examples = config.batch_size
    assert f"[{examples},{examples}] = cholesky" in text
    assert f"[{10 * examples},{10 * examples}]" not in text


@pytest.mark.parametrize("name", ["noisy_kfac", "k_bfgs", "sophia"])
def test_those_with_needs_of_their_own_change_the_parameters(name):
    """Parameters drawn from a posterior; losses of the data, and a second pass; drawn labels."""
    start, step = one_step(name)
    before = jax.jit(start)()
    after, reports = jax.jit(step)(before)
    assert np.isfinite(reports).all()
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), before.params, after.params)
    assert any(jax.tree.leaves(moved))


def test_every_variant_of_the_family_has_one_grid_and_every_method():
    configs = [read_config("family", x) for x in ("digits", "autoencoder", "cnn")]
    for config in configs:
        assert set(ko.CATALOGUE) <= set(config.optimizers) <= set(OPTIMIZERS)
        assert "per_optimizer" not in config and config.grid == configs[0].grid
        assert (config.epochs, config.seeds) == (configs[0].epochs, configs[0].seeds)
    assert len({config.name for config in configs}) == 3
    with pytest.raises(ValueError, match="got 'mnist', expected one of"):
        read_config("family", "mnist")


def test_baselines_are_those_of_optax():
    """With the weight decay of the configuration, which they subtract themselves."""
    config = ml_collections.ConfigDict({"weight_decay": 0.1, "momentum": 0.9})
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    grads = jax.tree.map(jnp.sin, params)
    for name, own in (
        ("adamw", optax.adamw(0.1, weight_decay=0.1)),
        ("lion", optax.lion(0.1, weight_decay=0.1)),
    ):
        made = OPTIMIZERS[name].build(config, None, 0.1)
        updates, _ = made.update(grads, made.init(params), params)
        expected, _ = own.update(grads, own.init(params), params)
        np.testing.assert_array_equal(updates["w"], expected["w"])
    assert set(OF_OPTAX) <= set(OPTIMIZERS)


def test_labels_and_styles_tell_them_apart():
    aliases = {"two_level", "two_level_adaptive"}  # of presets with longer names
    names = [name for name in OPTIMIZERS if name not in aliases]
    for of in (plots.style, lambda name: OPTIMIZERS[name].label):
        assert len({of(name) for name in names}) == len(names)


def test_a_word_that_nothing_knows_is_refused():
    curved = Curved(helpers.plain_problem().layers, OPTIONS | {"dampin": 1.0})
    for name in ("kfac", "eva", "k_bfgs"):
        with pytest.raises(TypeError, match="unknown argument 'dampin'"):
            OPTIMIZERS[name].build(CONFIG, curved, 0.1)


def test_an_average_forgets_a_bad_gradient():
    average, plain = average_of_finite(0.9), optax.ema(0.9)
    state, expected = average.init(jnp.zeros(2)), plain.init(jnp.zeros(2))
    for gradient in (jnp.ones(2), jnp.array([jnp.nan, 1.0]), jnp.array([2.0, -1.0])):
        out, state = average.update(gradient, state)
        if jnp.isnan(gradient).any():
            np.testing.assert_array_equal(out, gradient)  # for what follows to see
            continue
        right, expected = plain.update(gradient, expected)
        np.testing.assert_allclose(out, right, rtol=1e-6)
