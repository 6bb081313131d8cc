"""Words of presets: seen one by one by `inject_hyperparams`, known or refused, never without
effect."""

import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import kfac_optax as ko
from kfac_optax.methods.signature import STATIC
from tests.methods.test_catalogue import ESTIMATOR, arguments, every_method, problem

PARAMS, X, Y = problem()
LAYERS = ESTIMATOR.layers(PARAMS, X)
OF_BATCH = {False: arguments(X, Y), True: arguments(X, Y, of_losses=True)}
# Numbers of a build, and those that have no default that is a number.
GIVEN = {"learning_rate": 0.1, "kl_clip": 1e-3, "reject_below": 0.0}


def words(name):
    return inspect.signature(getattr(ko, name)).parameters


def made(name, factory=None, **given):
    """A preset, for the layers where it is one of layers."""
    layers = (LAYERS,) if "layers" in words(name) else ()
    return (factory or getattr(ko, name))(*layers, **given)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers(name):
    """Every word whose default is a number, and rates; with short periods."""
    found = {word: p.default for word, p in words(name).items() if is_number(p.default)}
    found |= {word: value for word, value in GIVEN.items() if word in words(name)}
    short = {"curvature_every": 2, "inverse_every": 3, "adapt_every": 2, "correct_every": 2}
    short["ridge"] = 1e-2  # roots of what is nearly singular make rounding large
    found |= {word: value for word, value in short.items() if word in words(name)}
    return found


def of_batch(name):
    # skfac has room for one pullback, where it is not told of more
    return OF_BATCH["losses" in ko.CATALOGUE[name].needs or name == "skfac"]


def run(name, *txs, steps=4):
    """Parameters and states of all, side by side: one program for what they have in common."""

    def one(tx, params, state):
        gradient, more = of_batch(name)(params, jnp.float32(1))
        updates, state = tx.update(gradient, state, params, **more)
        return optax.apply_updates(params, jax.tree.map(lambda u: 0.1 * u, updates)), state

    @jax.jit
    def step(all_of):
        return [one(tx, *mine) for tx, mine in zip(txs, all_of, strict=True)]

    all_of = jax.jit(lambda: [(PARAMS, tx.init(PARAMS)) for tx in txs])()
    for _ in range(steps):
        all_of = step(all_of)
    return all_of, step


@every_method
def test_every_number_can_be_injected(name):
    """Numbers arrive as arrays in the state, and change nothing as long as they are the same."""
    static = {word: 2 for word in ("rank", "window") if word in words(name)}
    if name == "hylo":  # its choice of rows makes another update of another rounding
        static["bound"] = "damped"
    given = numbers(name)
    factory = optax.inject_hyperparams(getattr(ko, name), static_args=tuple(static))
    txs = made(name, **given, **static), made(name, factory, **given, **static)
    (beside, (injected, state)), step = run(name, *txs)
    assert set(state.hyperparams) == set(given)
    assert set(given) & set(STATIC) == set()
    chex.assert_trees_all_close(injected, beside[0], rtol=1e-4, atol=1e-5)

    # all of them without sense in one step: the last good ones count, and each is named
    spoilt = {word: nonsense(value) for word, value in state.hyperparams.items()}
    _, (params, after) = step([beside, (injected, state._replace(hyperparams=spoilt))])
    _, (expected, _) = step([beside, (injected, state)])
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
    said = " ".join(ko.problems(after))
    # KL-clip alone reads no momentum
    unused = ["momentum"] if "bound" in static else []
    assert [word for word in given if f"1 values of {word} made" not in said] == unused


def nonsense(value):
    return jnp.full_like(value, jnp.nan if jnp.issubdtype(value.dtype, jnp.floating) else -1)


@every_method
def test_injection_needs_nothing_but_the_layers(name):
    """No default stands in the way, such as a rank that would become an array."""
    rate = {"learning_rate": 0.1} if "learning_rate" in words(name) else {}
    tx = made(name, optax.inject_hyperparams(getattr(ko, name)), **rate)
    gradient, more = of_batch(name)(PARAMS, jnp.float32(1))
    state = jax.eval_shape(tx.init, PARAMS)
    updates, _ = jax.eval_shape(lambda s: tx.update(gradient, s, PARAMS, **more), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)


@pytest.mark.parametrize("word", ["rank", "oversampling", "power_iterations", "seed"])
def test_a_static_number_that_is_an_array_says_so(word):
    tx = optax.inject_hyperparams(ko.rs_kfac)(LAYERS, learning_rate=0.1, **{word: 2})
    with pytest.raises(TypeError, match=rf'rs_kfac: {word} is an array.*static_args=\("{word}",\)'):
        tx.init(PARAMS)


@every_method
def test_an_unknown_word_is_an_error_that_names_what_exists(name):
    those = ("initial_damping", "damping", "decay", "window", "power")
    first = next(word for word in those if word in words(name))
    wrong, last = first[:-1], list(words(name))[-1]
    message = rf"^{name}: got an unknown argument '{wrong}'. Did you mean '{first}'\?.*{last}"
    with pytest.raises(TypeError, match=message):
        made(name, **{wrong: 0.1})


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("kfac_adaptive", "damping"),
        ("kfac_adaptive", "bound"),
        ("kfac_two_level_adaptive", "coupling"),
        ("rs_kfac", "block"),
        ("rs_kfac", "correct_share"),
        ("b_r_kfac", "correct_every"),
        ("b_kfac", "online"),
    ],
)
def test_what_a_preset_decides_on_itself_is_no_word_of_it(name, word):
    with pytest.raises(TypeError, match=f"{name}: got an unknown argument '{word}'"):
        getattr(ko, name)(LAYERS, **{word: 1})


def by_layer(layer):
    return ko.kronecker()


@pytest.mark.parametrize(
    ("word", "value", "default"),
    [
        ("inverse", "cholesky", "auto"),
        ("normalization", "diagonal", "unitwise"),
        ("convolution", "sua", "kfc"),
        ("recurrence", "option1", "independent"),
        ("sharing", "reduce", "expand"),
        ("positions", 3, None),
    ],
)
def test_words_beside_a_function_of_the_layer_raise(word, value, default):
    message = rf"got {word}={value!r}, which has no effect beside .*block=.*expected {default!r}"
    for preset in (ko.kfac, ko.kfac_two_level):
        with pytest.raises(ValueError, match=message):
            preset(LAYERS, learning_rate=0.1, block=by_layer, **{word: value})
        preset(LAYERS, learning_rate=0.1, block=by_layer, **{word: default})


@pytest.mark.parametrize("options", [dict(sharing="reduce"), dict(positions=3)])
def test_words_of_the_block_beside_a_block_raise(options):
    with pytest.raises(ValueError, match=r"which has no effect beside block=.*kronecker\("):
        ko.kfac(LAYERS, learning_rate=0.1, block=ko.kronecker("cholesky"), **options)
    ko.kfac(LAYERS, learning_rate=0.1, block=ko.kronecker("cholesky"), inverse="cholesky")


def test_normalisation_layers_can_be_left_out_beside_a_function():
    ko.kfac(LAYERS, learning_rate=0.1, block=by_layer, normalization="pass")
    with pytest.raises(ValueError, match="normalization='diagonal', which has no effect"):
        ko.scale_by_curvature(LAYERS, block=by_layer, normalization="diagonal")


def test_adaptive_presets_take_a_function_as_it_is():
    ko.kfac_adaptive(LAYERS, block=by_layer)
    with pytest.raises(ValueError, match="recurrence='option1', which has no effect"):
        ko.kfac_adaptive(LAYERS, block=by_layer, recurrence="option1")


def test_the_operator_of_deflation_has_no_effect_on_the_additive_correction():
    with pytest.raises(ValueError, match="coarse_operator='averaged', which has no effect"):
        ko.kfac_two_level(LAYERS, learning_rate=0.1, coarse_operator="averaged")


@pytest.mark.parametrize("normalization", ["diagonal", "pass"])
def test_low_rank_presets_hand_words_to_where_they_act(normalization):
    ko.rs_kfac(
        LAYERS,
        learning_rate=0.1,
        normalization=normalization,
        inverse="cholesky",
        sharing="reduce",
        positions=3,
        recurrence="option1",
        convolution="sua",
    )


def test_an_injected_momentum_is_checked_where_a_bound_counts_it():
    make = optax.inject_hyperparams(ko.kfac)
    tx = make(LAYERS, learning_rate=0.1, bound="exact", momentum=0.8)
    [(_, state)], step = run("kfac", tx, steps=2)
    bad = state._replace(hyperparams=state.hyperparams | {"momentum": jnp.float32(jnp.nan)})
    [(params, after)], [(expected, _)] = step([(PARAMS, bad)]), step([(PARAMS, state)])
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    assert "1 values of momentum made no sense" in ko.problems(after)[0]


def test_a_schedule_of_a_whole_optimizer_is_checked():
    """And makes no step before it has given a rate."""

    def rate(count):
        return jnp.where((count == 0) | (count == 2), jnp.nan, 0.1)

    def updates(learning_rate):
        tx = ko.spring(learning_rate=learning_rate, damping=0.05, norm_constraint=None)
        step = jax.jit(lambda state, gradient, more: tx.update(gradient, state, PARAMS, **more))
        gradient, more = of_batch("spring")(PARAMS, jnp.float32(1))
        more = {"curvature": more["curvature"]}
        state, found = tx.init(PARAMS), []
        for _ in range(3):
            update, state = step(state, gradient, more)
            found.append(update)
        return found, state

    (found, state), (expected, _) = updates(rate), updates(0.1)
    chex.assert_trees_all_equal(found[0], jax.tree.map(jnp.zeros_like, found[0]))
    chex.assert_trees_all_close(found[1:], expected[1:], rtol=1e-5)
    assert ko.problems(state) == [
        "2 values of learning_rate made no sense (out of range, or not finite) and the last good "
        "one was used: look at its schedule, or what is injected."
    ]
