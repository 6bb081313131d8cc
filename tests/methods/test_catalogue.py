"""Records of methods: complete, true, and every method keeps the laws."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfac_optax as ko
from kfac_optax import methods, testing
from kfac_optax._types import Layer, Layout
from kfac_optax.methods.record import collect
from kfac_optax.testing import Case, Trial
from kfac_optax.testing.blocks import BLOCK_LAWS

ROOT = pathlib.Path(__file__).parents[2]
CATALOGUE = ko.CATALOGUE
RANK = 2  # of what `build` makes
# blocks whose statistic is no matrix to multiply with
WITHOUT_AVERAGE = ("b_kfac", "ingd", "singd", "skfac", "hylo")
# an estimator for another optimizer, and parts of presets
WITHOUT_RECORD = {"axes_table", "gnb_estimator", "low_rank_blocks", "matrix_labels"}
every_method = pytest.mark.parametrize("name", CATALOGUE)


def predict(params, x):
    x = jnp.tanh(ko.tap_dense(x @ params["a"] + params["b"], x, params["a"], params["b"]))
    return ko.Normal(ko.tap_dense(x @ params["c"], x, params["c"]))


ESTIMATOR = ko.ggn(predict)


def problem(inputs=4, hidden=3, examples=5):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": jax.random.normal(keys[0], (inputs, hidden)),
        "b": jnp.zeros(hidden),
        "c": jax.random.normal(keys[1], (hidden, 2)),
    }
    return params, jax.random.normal(keys[2], (examples, inputs)), jnp.ones((examples, 2))


def losses(params, x, y):
    return predict(params, x).nll(y)


def arguments(x, y, of_losses=False):
    def of_batch(params, scale):
        def loss(p):
            return predict(p, scale * x).mean_nll(y)

        value, gradient = jax.value_and_grad(loss)(params)
        curvature = ESTIMATOR.at(params, scale * x)
        if of_losses:
            curvature = ko.empirical_fisher(losses).at(params, scale * x, y)
        # one example, whose labels are those of the data: for shapes and laws alone
        sampled = jax.tree.map(lambda g: g[None], gradient)
        more = {"curvature": curvature, "value": value, "value_fn": loss}
        return gradient, more | {"sampled_grads": sampled}

    return of_batch


def trial(name, make=None):
    params, x, y = problem()
    layers = ESTIMATOR.layers(params, x)
    tx = CATALOGUE[name].build(layers) if make is None else make(layers)
    of_losses = make is None and "losses" in CATALOGUE[name].needs
    return Trial(name, tx, params, arguments(x, y, of_losses))


def test_public_presets_and_records_match_both_ways():
    public = set()
    for name in ko.__all__:
        thing = getattr(ko, name)
        mine = getattr(thing, "__module__", "").startswith("kfac_optax.methods.")
        if mine and inspect.isfunction(thing) and not name.startswith("scale_by_"):
            public.add(name)
    assert public - WITHOUT_RECORD == set(CATALOGUE)


def test_every_file_with_records_is_collected():
    found = []
    for module in pkgutil.walk_packages(methods.__path__, "kfac_optax.methods."):
        found += getattr(importlib.import_module(module.name), "RECORDS", ())
    assert sorted(x.name for x in found) == sorted(CATALOGUE)
    assert all(CATALOGUE[record.name] is record for record in found)


def test_a_record_twice_or_with_an_unknown_need_is_refused():
    record = CATALOGUE["kfac"]
    with pytest.raises(ValueError, match="two records are named 'kfac'"):
        collect([record], [record])
    with pytest.raises(ValueError, match="'hessian'"):
        collect([dataclasses.replace(record, needs=frozenset({"hessian"}))])


@every_method
def test_the_state_is_the_formula(name):
    """At two sizes, so that no term hides in a constant; the second has factors followed online.

    A bound on the whole movement keeps the last parameters besides.
    """
    scalars = set()
    known = inspect.signature(getattr(ko, name)).parameters
    alone = {"bound": "damped"} if "bound" in known else {}
    for sizes in ((4, 3, 5), (14, 12, 4)):
        params, x, _ = problem(*sizes)
        layers = ESTIMATOR.layers(params, x)
        state = jax.eval_shape(CATALOGUE[name].build(layers, **alone).init, params)
        leaves = jax.tree.leaves(state)
        arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim)
        assert arrays == 4 * CATALOGUE[name].numbers(layers, rank=RANK)
        scalars.add(sum(leaf.ndim == 0 for leaf in leaves))
    assert len(scalars) == 1


@every_method
def test_the_named_test_exists(name):
    path, _, function = CATALOGUE[name].test.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


@every_method
def test_needs_are_needed(name):
    """An update without one of them is an error, or does without statistics."""
    run = trial(name)
    gradient, more = run.arguments(run.params, 1.0)
    argument_of = {"curvature": "curvature", "value": "value", "value_fn": "value_fn"}
    for need, argument in (argument_of | {"sampled": "sampled_grads"}).items():
        less = {word: given for word, given in more.items() if word != argument}
        if need in CATALOGUE[name].needs:
            with pytest.raises(ValueError, match=argument):
                run.tx.update(gradient, run.tx.init(run.params), run.params, **less)
        else:
            more = less
    jax.eval_shape(
        lambda s: run.tx.update(gradient, s, run.params, **more), run.tx.init(run.params)
    )


@every_method
def test_transformations_keep_the_laws(name):
    testing.check_transformation(trial(name))


@pytest.mark.parametrize("name", [name for name, x in CATALOGUE.items() if x.block_of])
def test_blocks_keep_the_laws(name):
    p, q, rows = 10, 9, 4
    layer = Layer("x", "dense", "w", None, p, q, Layout((p, q), (p, q), (0, 1)), rows=rows)
    block = CATALOGUE[name].block_of(layer)
    exact = block.name == "kronecker (eigh)"
    averaged = name not in WITHOUT_AVERAGE
    outputs = name not in ("foof", "eva_f")  # which are made of inputs alone
    scales = name != "thor"  # which shares its damping out equally
    damped = True
    if name in ("mkor", "mkor_h"):  # whose inverse starts as the identity, whatever the statistic
        outputs, damped = False, False
    kinds = dict(exact=exact, averaged=averaged, outputs=outputs, scales=scales, damped=damped)
    case = testing.dense_case(block, p, q, **kinds)
    testing.check_block(case)


# A block as a user writes one: the diagonal of the Fisher matrix.
def _measure(a, g, use):
    a, g = a.astype(use.dtype), g.astype(use.dtype)
    if use.bias:
        a = jnp.concatenate([a, jnp.ones((len(a), 1), a.dtype)], -1)
    if use.weights is not None:
        a = jnp.where(use.weights[..., None] > 0, a, 0)
    return jnp.einsum("ni,nj->ij", a**2, g**2) / use.examples


OWN = ko.Block(
    name="diagonal of my own",
    init=lambda layer, dtype: jnp.ones(layer.shape, dtype),
    measure=_measure,
    factorize=lambda statistic, damping: statistic + damping,
    solve=lambda inverse, v, damping: v / inverse,
    multiply=lambda statistic, v: statistic * v,
)


def test_a_block_of_a_user_keeps_the_laws_and_trains():
    for bias in (False, True):
        testing.check_block(testing.dense_case(OWN, bias=bias, exact=True))
    testing.check_transformation(
        trial("own", lambda layers: ko.kfac(layers, learning_rate=0.1, block=OWN))
    )


def _in_order(a, g, use):
    return _measure(a, g * jnp.arange(1, len(g) + 1)[:, None], use)


def _without_weights(a, g, use):
    return _measure(a, g, use._replace(weights=None))


BROKEN = [
    (
        "measure has the shapes and dtypes",
        dict(init=lambda layer, dtype: jnp.ones(layer.shape[1:], dtype)),
    ),
    ("float32 in, float32 out", dict(factorize=lambda s, lam: (s + lam).astype(jnp.float16))),
    ("all that is made of it is finite", dict(factorize=lambda s, lam: s)),
    ("solve is symmetric", dict(solve=lambda x, v, lam: (v + 0.1 * jnp.roll(v, 1, 0)) / x)),
    ("solve is positive definite", dict(solve=lambda x, v, lam: -v / x)),
    ("solve is linear", dict(solve=lambda x, v, lam: v / x + v**2)),
    ("multiply is symmetric", dict(multiply=lambda s, v: jnp.roll(v, 1, 0) * s)),
    ("multiply is positive semi-definite", dict(multiply=lambda s, v: -s * v)),
    ("solve inverts multiply", dict(factorize=lambda s, lam: s + 2 * lam)),
    ("large damping leaves", dict(factorize=lambda s, lam: s + 2 * lam)),
    ("solve follows the scale of the loss", dict(factorize=lambda s, lam: s + lam**2)),
    ("mean of its halves", dict(measure=lambda a, g, u: _measure(a, g, u._replace(examples=1)))),
    ("the order of examples", dict(measure=_in_order)),
    ("weight zero counts as dropped", dict(measure=_without_weights)),
]


@pytest.mark.parametrize(("law", "change"), BROKEN, ids=[law for law, _ in BROKEN])
def test_a_block_that_breaks_a_law_is_told_which(law, change):
    case = testing.dense_case(OWN._replace(**change), exact=True)
    messages = []
    for check in BLOCK_LAWS:
        try:
            check(case)
        except AssertionError as error:
            messages.append(str(error))
    assert any(law in message for message in messages), messages
    assert all("'diagonal of my own'" in message for message in messages)


def test_a_transformation_that_breaks_a_law_is_told_which():
    good = trial("kfac")

    def with_update(update):
        return good._replace(tx=good.tx._replace(update=update))

    def unclean(grads, state, params, **more):
        return jax.tree.map(lambda x: 1 * x, grads), good.tx.update(grads, state, params, **more)[1]

    def widened(grads, state, params, **more):
        updates, state = good.tx.update(grads, state, params, **more)
        return updates, jax.tree.map(lambda x: x.astype(jnp.float32), state)

    def counting(grads, state, params, **more):
        updates, state = good.tx.update(grads, state, params, **more)
        return jax.tree.map(lambda x: x[None], updates), state

    with pytest.raises(AssertionError, match="a broken batch gives an update of zeros: found nan"):
        testing.check_broken_batch(with_update(unclean))
    with pytest.raises(AssertionError, match="the state keeps its structure, shapes and dtypes"):
        testing.check_steps(with_update(widened))
    with pytest.raises(AssertionError, match="updates are like parameters"):
        testing.check_steps(with_update(counting))


def test_cases_may_have_positions():
    rows = lambda seed, n: [
        tuple(
            jnp.asarray(np.random.default_rng(seed + d).standard_normal((n, 2, d))) for d in (3, 2)
        )
    ]
    testing.check_batch_split(Case(ko.kronecker(), testing.dense_layer(3, 2), rows))
