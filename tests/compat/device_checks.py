"""Checks on eight CPU devices, run by `test_many_devices.py` in processes of their own:
`python -m ... NAMES`.
"""

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfac_optax as ko
from kfac_optax.linalg import example_moments
from tests import helpers as h
from tests.compat import (
    catalogue_checks,
    local_statistics_checks,
    model_parallel_checks,
    own_gradient_checks,
    placement_checks,
    preset_checks,
    wide_layer_checks,
)

DEVICES, EXAMPLES = 8, 16


def _data():
    x = jax.random.normal(jax.random.key(3), (EXAMPLES, 4))
    # two devices have padding only, the others one or two examples of different weight
    weights = jnp.array([0, 0, 1, 0, 0.5, 1, 1, 1, 0, 2, 1, 1, 0, 0, 3, 1], jnp.float32)
    return x, jnp.arange(EXAMPLES) % 3, weights


def _weighted(params, x, weights):
    return ko.Categorical(h.plain_predict(params, x).logits, weights=weights)


def _per_example(params, x, weights):
    """One example vectorised, as Equinox users write it; more columns than are pulled back at once,
    from constants.
    """
    mean = jax.vmap(lambda row: h.plain_predict(params, row).logits)(x)
    return ko.Normal(jnp.concatenate([mean, 2 * mean, 3 * mean], -1), 0.5, weights=weights)


class Case(NamedTuple):
    """A model, a preset and whether the step inverts (else it only measures, which compiles
    faster).
    """

    predict: Callable[..., Any]
    preset: str
    refresh: bool
    settings: dict[str, Any] = {}

    @property
    def estimator(self):
        return ko.ggn(self.predict)

    def tx(self, *batch, **settings):
        layers = self.estimator.layers(h.plain_params(), *batch)
        short = {"learning_rate": 0.1, "damping": 0.05, "bound": "damped"}
        return h.PRESETS[self.preset](layers, **short | self.settings | settings)

    def step(self, tx):
        return _step(tx, self.estimator, refresh=self.refresh)

    def expected(self):
        """Updates and state of one step on one device."""
        return _expected((*CASES, *COUPLED).index(self))


CASES = (
    Case(_weighted, "kfac_two_level", True),
    Case(_weighted, "kfac_two_level", False, {"coarse": "exact"}),
    Case(_per_example, "kfac", False),
)
COUPLED = (
    Case(_weighted, "kfac_two_level", True, {"correction": "bnn"}),
    Case(_weighted, "kfac", True, {"inverse": "cholesky", "coupling": ko.tridiagonal()}),
)


@functools.cache
def _expected(index):
    case, params, (x, _, weights) = (*CASES, *COUPLED)[index], h.plain_params(), _data()
    tx = case.tx(x, weights)
    return jax.device_get(case.step(tx)(params, jax.jit(tx.init)(params), x, weights))


def _step(tx, estimator, key=None, refresh=True):
    @jax.jit
    def step(params, state, *batch):  # any gradient will do, so the parameters serve
        return tx.update(
            params, state, params, curvature=estimator.at(params, *batch, key=key), refresh=refresh
        )

    return step


def _same(result, expected):
    h.assert_close(jax.device_get(result), expected)


def auto_axes():
    """`jit` with a batch sharded over automatic axes: the numbers of one device, nothing asked of
    the user.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, _, weights = _data()
    case = CASES[0]
    tx = case.tx(x, weights)
    params = jax.device_put(h.plain_params(), whole)
    state = jax.jit(tx.init, out_shardings=whole)(params)
    step, batch = case.step(tx), jax.device_put((x, weights), split)
    updates, after = step(params, state, *batch)
    _same((updates, after), case.expected())
    shardings = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), after, state
    )
    assert all(jax.tree.leaves(shardings))
    with h.Compilations() as compiled:
        step(params, after, *batch)
    assert compiled.names == []


def auto_axes_sharded_parameters():
    """Kernels split over a model axis, the batch over a data axis, both automatic."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, _, weights = _data()
    case = CASES[1]
    tx = case.tx(x, weights)
    step = case.step(tx)
    specs = jax.tree.map(
        lambda p: P(None, "model") if p.ndim == 2 else P("model"), h.plain_params()
    )
    params = jax.device_put(
        h.plain_params(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    )
    assert not params["first"]["w"].sharding.is_fully_replicated
    batch = jax.device_put((x, weights), NamedSharding(mesh, P("data")))
    updates, state = step(params, jax.jit(tx.init)(params), *batch)
    _same((updates, state), case.expected())
    _, after = step(params, state, *batch)
    h.assert_same_types(after, state)


def explicit_axes(cases=CASES):
    """`jax.make_mesh` makes explicit axes now: same numbers, and the types of the state never
    change.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",))
    assert mesh.axis_types == (AxisType.Explicit,)
    x, _, weights = _data()
    for case in cases:
        tx, expected = case.tx(x, weights), case.expected()
        with jax.set_mesh(mesh):
            params = jax.device_put(h.plain_params(), P())
            batch = jax.device_put((x, weights), P("data"))
            assert jax.typeof(batch[0]).sharding.spec == P("data", None)
            state = tx.init(params)
            updates, after = case.step(tx)(params, state, *batch)
            _same((updates, after), expected)
            h.assert_same_types(after, state)
            h.assert_same_types(updates, params)
            if case is CASES[0]:
                h.assert_same_types(jax.jit(tx.init)(params), state)


def explicit_axes_sampled_labels():
    """The sampled Fisher on explicit axes, with the traced schedule and a real gradient."""
    mesh = jax.make_mesh((DEVICES,), ("data",))
    x, y, weights = _data()
    estimator = ko.fisher(_weighted)
    tx = ko.kfac(
        estimator.layers(h.plain_params(), x, weights),
        learning_rate=0.1,
        damping=0.05,
        bound="damped",
    )

    @jax.jit
    def step(params, state, x, y, weights, key):
        grads = jax.grad(lambda p: jnp.mean(h.plain_predict(p, x).nll(y)))(params)
        return tx.update(grads, state, params, curvature=estimator.at(params, x, weights, key=key))

    key = jax.random.key(5)
    expected = jax.device_get(
        step(h.plain_params(), jax.jit(tx.init)(h.plain_params()), x, y, weights, key)
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(h.plain_params(), P())
        state = tx.init(params)
        updates, after = step(params, state, *jax.device_put((x, y, weights), P("data")), key)
        _same((updates, after), expected)
        h.assert_same_types(after, state)


def explicit_axes_part_of_the_batch():
    """`subsample=` takes evenly spaced examples, of every device's share."""
    mesh = jax.make_mesh((DEVICES,), ("data",))
    x, params = _data()[0], h.plain_params()
    estimator = ko.ggn(h.plain_predict, subsample=0.5)
    tx = ko.kfac(estimator.layers(params, x), learning_rate=0.1, bound="damped")
    step = _step(tx, estimator, refresh=False)
    expected = jax.device_get(step(params, jax.jit(tx.init)(params), x))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, P())
        split = jax.device_put(x, P("data"))
        _same(step(params, tx.init(params), split), expected)
        with pytest.raises(ValueError, match="subsample=9 keeps 9 .* expected a multiple of 8"):
            ko.ggn(h.plain_predict, subsample=9).layers(params, split)


def shard_map(cases=CASES):
    """`axis_name=` inside `shard_map` that checks varying axes: exact also where devices have
    different weights.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x, _, weights = _data()
    specs = (P(), P(), P("data"), P("data"))
    for case in cases:
        tx, params = case.tx(x, weights, axis_name="data"), h.plain_params()
        step = jax.shard_map(
            case.step(tx), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True
        )
        _same(jax.jit(step)(params, jax.jit(tx.init)(params), x, weights), case.expected())


def couplings():
    """Exact products and cross factors of a split batch are those of the whole, on manual and on
    explicit axes.
    """
    shard_map(COUPLED)
    explicit_axes(COUPLED)


def shard_map_without_weight():
    """A batch of which no device has an example that counts is left out; one that a single device
    has is not.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x, _, weights = _data()
    case, params = CASES[0], h.plain_params()
    tx = case.tx(x, weights, axis_name="data")
    specs = (P(), P(), P("data"), P("data"))
    # measured only: what is held plays no part
    step = _step(tx, case.estimator, refresh=False)
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True))
    _, first = step(params, jax.jit(tx.init)(params), x, weights)
    _, none = step(params, first, x, jnp.zeros_like(weights))
    _, one = step(params, none, x, jnp.zeros_like(weights).at[-1].set(1.0))
    states = [jax.device_get(state.preconditioner) for state in (first, none, one)]
    assert [int(state.curvature_count) for state in states] == [1, 1, 2]
    assert [int(state.skipped_statistics) for state in states] == [0, 0, 0]
    measured = [jax.tree.leaves((state.factors, state.coarse.coarse_factors)) for state in states]
    for before, after, later in zip(*measured, strict=True):
        np.testing.assert_array_equal(after, before)
        assert np.isfinite(later).all() and (later != before).any()


def shard_map_schedule():
    """The traced schedule and a real gradient, three steps; the branches agree about what varies."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x, y, _ = _data()
    problem = h.make_problem(h.plain_predict, h.plain_params(), x, y)
    tx, single = (
        h.make_tx("kfac_two_level", problem, axis_name="data"),
        h.make_tx("kfac_two_level", problem),
    )

    def train(params, x, y):
        state = tx.init(params)
        for _ in range(3):
            grads = jax.grad(lambda p: jax.lax.pmean(problem.loss(p, x, y), "data"))(params)
            updates, state = tx.update(
                grads, state, params, curvature=problem.estimator.at(params, x)
            )
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        return params, state

    sharded = jax.shard_map(
        train, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=True
    )
    params, state, _ = h.run(single, problem, 3)
    _same(jax.jit(sharded)(problem.params, x, y), jax.device_get((params, state)))


def shard_map_adaptive():
    """Damping, rate and momentum adapted on a split batch are those of the whole; the loss of each
    device is its own.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x, y, _ = _data()
    estimator, params = ko.ggn(h.plain_predict), h.plain_params()
    layers = estimator.layers(params, x)

    def train(axis_name, params, x, y):
        tx = ko.kfac_adaptive(
            layers, curvature_every=1, inverse_every=2, adapt_every=2, axis_name=axis_name
        )
        state = tx.init(params)

        def loss(params):
            return jnp.mean(h.plain_predict(params, x).nll(y))

        def whole(params):
            return loss(params) if axis_name is None else jax.lax.pmean(loss(params), axis_name)

        for _ in range(3):
            curvature = estimator.at(params, x)
            known = {"curvature": curvature, "value": loss(params), "value_fn": loss}
            updates, state = tx.update(jax.grad(whole)(params), state, params, **known)
            params = optax.apply_updates(params, updates)
        return params, state

    specs = (P(), P("data"), P("data"))
    sharded = jax.shard_map(
        functools.partial(train, "data"), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True
    )
    expected = jax.device_get(jax.jit(functools.partial(train, None))(params, x, y))
    assert expected[1].reduction_ratio != 1
    _same(jax.jit(sharded)(params, x, y), expected)


def online():
    """Factors followed online, and gradients from rows: rows of all devices, under `shard_map` and
    on explicit axes.
    """
    x = jax.random.normal(jax.random.key(3), (EXAMPLES, 40))
    y, params = jnp.sin(x[:, :30]), {"w": jax.random.normal(jax.random.key(4), (40, 30)) / 6}
    # no draws, no sum over columns
    estimator = ko.empirical_fisher(lambda p, x, y: _wide(p, x).nll(y))
    shared = ko.ggn(_wide)
    layers = estimator.layers(params, x, y)

    def step(axis_name, factored, params, state, x, y, *, mean=False):
        tx = ko.b_r_kfac(
            layers, rank=5, learning_rate=0.1, axis_name=axis_name, factored_gradient=factored
        )

        def loss_fn(prediction, y):
            loss = prediction.mean_nll(y)
            return jax.lax.pmean(loss, axis_name) if mean else loss

        _, grads, curvature = shared.value_and_grad(loss_fn)(params, x, targets=y)
        if axis_name is not None and not mean:
            grads = jax.lax.pmean(grads, axis_name)
        if not factored:  # statistics of the other would be thirty columns
            curvature = estimator.at(params, x, y)
        return tx.update(
            grads, state, params, curvature=curvature, measure=not factored, refresh=False
        )

    state = ko.b_r_kfac(layers, rank=5, learning_rate=0.1).init(params)
    single = functools.partial(step, None)
    _, expected_state = jax.jit(functools.partial(single, False))(params, state, x, y)
    expected, _ = jax.jit(functools.partial(single, False))(params, expected_state, x, y)
    assert "5 of 40 online" in str(ko.coverage(layers, block=ko.low_rank_blocks("b_kfac", rank=5)))

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P("data"), P("data"))

    def sharded(factored, mean):
        mapped = functools.partial(step, "data", factored, mean=mean)
        # with tracking, the gradient of a loss that every device has of its own is a sum
        return jax.jit(
            jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=mean)
        )

    for mean in (False, True):
        _, after = sharded(False, mean)(params, state, x, y)
        _same(sharded(False, mean)(params, after, x, y)[0], jax.device_get(expected))
        dense = jax.jit(functools.partial(single, True))(params, jax.device_get(after), x, y)[0]
        _same(sharded(True, mean)(params, after, x, y)[0], jax.device_get(dense))

    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",))):
        placed = jax.device_put((x, y), P("data")), jax.device_put((params, state), P())
        (x, y), (params, state) = placed
        _, after = jax.jit(functools.partial(single, False))(params, state, x, y)
        h.assert_same_types(after, state)
        _same(
            jax.jit(functools.partial(single, False))(params, after, x, y)[0],
            jax.device_get(expected),
        )


def _whole_examples():
    """A layer of positions that is used twice, and another; estimator, parameters and batch."""
    keys = jax.random.split(jax.random.key(6), 5)
    params = {"twice": jax.random.normal(keys[0], (4, 4)), "head": h.plain_params()["last"]}
    x, weights = jax.random.normal(keys[1], (EXAMPLES, 3, 4)), _data()[2]

    def predict(params, x, weights):
        for _ in range(2):
            x = jnp.tanh(h.dense(x, params["twice"]))
        x = jnp.tanh(h.dense(x, params["head"]["w"], params["head"]["b"])).sum(1)
        return ko.Categorical(x, weights=weights)

    return ko.ggn(predict), params, (x, weights)


def moments():
    """Moments in an eigenbasis are means over all devices' examples: one row each, positions added
    up first, a layer used twice; automatic axes, explicit ones and `shard_map`."""
    estimator, params, (x, weights) = _whole_examples()
    layers = estimator.layers(params, x, weights)

    def step(axis_name, refresh):
        tx = ko.ekfac(layers, learning_rate=0.1, damping=0.05, axis_name=axis_name)
        return _step(tx, estimator, refresh=refresh)

    state = jax.jit(ko.ekfac(layers, learning_rate=0.1).init)(params)
    _, state = jax.device_get(step(None, True)(params, state, x, weights))
    expected = jax.device_get(step(None, False)(params, state, x, weights))
    (core,) = [s for s in jax.tree.leaves(expected[1], is_leaf=_has_inverses) if _has_inverses(s)]
    for inverse in core.inverses.values():
        np.testing.assert_array_equal(inverse.measured, 1)
        product = inverse.inputs.values[:, :, None] * inverse.outputs.values[:, None]
        assert np.abs(inverse.moments - product).max() > 0.05 * product.max()

    auto = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P("data"), P("data"))
    example_moments.ENTRIES = 1  # products of one example at a time
    for check in (False, True):
        sharded = jax.shard_map(
            step("data", False), mesh=auto, in_specs=specs, out_specs=P(), check_vma=check
        )
        _same(jax.jit(sharded)(params, state, x, weights), expected)
    batch = jax.device_put((x, weights), NamedSharding(auto, P("data")))
    _same(step(None, False)(params, state, *batch), expected)
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",))):
        params, state = jax.device_put((params, state), P())
        batch = jax.device_put((x, weights), P("data"))
        got = step(None, False)(params, state, *batch)
        _same(got, expected)
        h.assert_same_types(got[1], state)


def power_steps():
    """So are the products of power iterations, and the directions that follow from them."""
    estimator, params, batch = _whole_examples()
    layers = estimator.layers(params, *batch)
    specs = (P(), P(), P("data"), P("data"))
    auto = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    words = dict(learning_rate=0.1, damping=0.05, kl_clip=None)
    tx = ko.kpsvd(layers, rank=2, **words)
    step = _step(tx, estimator, refresh=False)
    _, state = jax.device_get(step(params, jax.jit(tx.init)(params), *batch))
    expected = jax.device_get(step(params, state, *batch))
    mapped = _step(ko.kpsvd(layers, rank=2, axis_name="data", **words), estimator, refresh=False)
    sharded = jax.shard_map(mapped, mesh=auto, in_specs=specs, out_specs=P(), check_vma=True)
    _same(jax.jit(sharded)(params, state, *batch), expected)
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",))):
        params, state = jax.device_put((params, state), P())
        got = step(params, state, *jax.device_put(batch, P("data")))
        _same(got, expected)
        h.assert_same_types(got[1], state)


def _has_inverses(node):
    return hasattr(node, "inverses")


def _wide(params, x):
    return ko.Normal(h.dense(x, params["w"]))


def shard_map_sampled_labels():
    """Every device draws labels of its own: the factor is the mean of the devices' with folded
    keys.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    # all devices see the same
    x = jnp.tile(jax.random.normal(jax.random.key(3), (1, 4)), (EXAMPLES, 1))
    estimator, key, params = ko.fisher(h.plain_predict), jax.random.key(11), h.plain_params()
    layers = estimator.layers(params, x)
    tx, single = (
        ko.kfac(layers, learning_rate=0.1, axis_name="data", bound="damped"),
        ko.kfac(layers, learning_rate=0.1, bound="damped"),
    )
    state = jax.jit(tx.init)(params)

    def outputs(state):
        return optax.tree.get(state, "factors")["dense_5x4_bias"].outputs

    step = _step(tx, estimator, key, refresh=False)
    step = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=True
    )
    got = outputs(jax.jit(step)(params, state, x)[1])

    @jax.jit
    def local(key):
        curvature = estimator.at(params, x[: EXAMPLES // DEVICES], key=key)
        return outputs(single.update(params, state, params, curvature=curvature, refresh=False)[1])

    parts = [local(jax.random.fold_in(key, i)) for i in range(DEVICES)]
    np.testing.assert_allclose(got, np.mean(parts, 0), rtol=1e-4, atol=1e-6)
    assert not np.allclose(got, local(key), rtol=1e-2)


def pmap():
    """`pmap` with `axis_name=`, the batch with a leading device axis."""
    x, _, weights = _data()
    shards = jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), (x, weights))
    case, params = CASES[1], h.plain_params()
    tx = case.tx(x, weights, axis_name="i")
    step = jax.pmap(case.step(tx), axis_name="i", in_axes=(None, None, 0, 0), out_axes=0)
    result = step(params, jax.jit(tx.init)(params), *shards)
    for leaf in jax.tree.leaves(result):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    _same(jax.tree.map(lambda leaf: leaf[0], result), case.expected())


def _zoo(params, x, tokens):
    """Every kind of block: convolution, embedding, scale and shift, dense, a parameter on its own."""
    conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NWC", "WIO", "NWC"))
    s = ko.tap_conv(conv(x, params["conv"], (2,), "SAME"), x, params["conv"], strides=2)
    a = s / jnp.sqrt(1 + jnp.mean(s**2, -1, keepdims=True))
    s = ko.tap_scale_shift(
        a * params["scale"] + params["shift"], a, params["scale"], params["shift"]
    )
    s = jnp.tanh(
        s
        + ko.tap_embedding(
            params["table"].at[tokens].get(out_sharding=_like(s)), tokens, params["table"]
        )
    )
    s = s.sum(1) * h.computed(params["gain"])
    return ko.Categorical(ko.tap_dense(s @ params["head"], s, params["head"]))


def _like(x):
    sharding = jax.typeof(x).sharding
    return sharding if any(part is not None for part in sharding.spec) else None


def _zoo_problem():
    keys = jax.random.split(jax.random.key(5), 8)
    shapes = {
        "conv": (3, 2, 4),
        "scale": (4,),
        "shift": (4,),
        "table": (5, 4),
        "gain": (4,),
        "head": (4, 3),
    }
    params = {
        name: jax.random.normal(key, shape) for (name, shape), key in zip(shapes.items(), keys)
    }
    x, tokens = (
        jax.random.normal(keys[6], (EXAMPLES, 6, 2)),
        jax.random.randint(keys[7], (EXAMPLES, 3), 0, 5),
    )
    estimator = ko.empirical_fisher(
        lambda p, x, tokens: _zoo(p, x, tokens).nll(jnp.arange(len(x)) % 3)
    )
    layers = estimator.layers(params, x, tokens)
    assert not [u for u in layers.uncovered if u.path != "gain"], layers

    def tx(**settings):
        return ko.kfac_two_level(layers, learning_rate=0.1, damping=0.05, **settings)

    return params, (x, tokens), estimator, tx


def every_layer_auto_axes():
    """A sharded batch through every kind of layer: the numbers of one device, the diagonal
    included.
    """
    params, batch, estimator, make = _zoo_problem()
    tx = make(uncovered="diagonal")
    step = _step(tx, estimator)
    expected = jax.device_get(step(params, jax.jit(tx.init)(params), *batch))
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    params = jax.device_put(params, whole)
    state = jax.jit(tx.init, out_shardings=whole)(params)
    _same(step(params, state, *jax.device_put(batch, split)), expected)


def every_layer_shard_map():
    """The same inside `shard_map`, without the diagonal, whose random signs differ from device to
    device.
    """
    params, batch, estimator, make = _zoo_problem()
    tx = make()
    expected = jax.device_get(_step(tx, estimator)(params, jax.jit(tx.init)(params), *batch))
    mesh = jax.make_mesh((DEVICES,), ("data",))
    tx = make(axis_name="data")
    step = jax.shard_map(
        lambda p, s, *b: _step(tx, _zoo_local())(p, s, *b),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, P())
        _same(
            jax.jit(step)(params, jax.jit(tx.init)(params), *jax.device_put(batch, P("data"))),
            expected,
        )


def _zoo_local():
    """Labels of one device's share of the batch."""

    def losses(params, x, tokens):
        labels = (jax.lax.axis_index("data") * len(x) + jnp.arange(len(x))) % 3
        return _zoo(params, x, tokens).nll(labels)

    return ko.empirical_fisher(losses)


def means():
    """Mean output gradients of a split batch are those of the whole, on manual and on explicit
    axes, from the empirical Fisher's pass and from the gradient's own."""
    losses = lambda p, x, y: h.plain_predict(p, x).nll(y)
    params, (x, y, _) = h.plain_params(), _data()
    own, exact = ko.empirical_fisher(losses), ko.ggn(h.plain_predict)
    shared = exact.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
    sources = (own.at, lambda p, x, y: shared(p, x, targets=y)[2])

    def step(source, axis_name=None):
        tx = ko.eva(exact.layers(params, x), kl_clip=None, axis_name=axis_name)

        def update(params, x, y):  # any gradient will do, so the parameters serve
            return tx.update(params, tx.init(params), params, curvature=source(params, x, y))[0]

        return update

    (expected, other) = (jax.device_get(jax.jit(step(source))(params, x, y)) for source in sources)
    h.assert_close(other, expected)
    manual = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((DEVICES,), ("data",))
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    for source in sources:
        mapped = jax.shard_map(step(source, "data"), mesh=manual, check_vma=True, **specs)
        _same(jax.jit(mapped)(params, x, y), expected)
        with jax.set_mesh(explicit):
            arguments = jax.device_put(params, P()), *jax.device_put((x, y), P("data"))
            _same(jax.jit(step(source))(*arguments), expected)
    over_all = exact.value_and_grad(lambda d, y: jax.lax.pmean(d.mean_nll(y), "data"))
    averaged = step(lambda p, x, y: over_all(p, x, targets=y)[2], "data")
    mapped = jax.shard_map(averaged, mesh=manual, check_vma=True, **specs)
    _same(jax.jit(mapped)(params, x, y), expected)


def samples():
    """The kernel of a split batch is that of the whole: by products and of rows, weights and padding
    included, inside `shard_map` with and without tracked axes, and on automatic and explicit axes."""
    params, (x, y, weights) = h.plain_params(), _data()
    estimator = ko.ggn(_weighted)
    layers = estimator.layers(params, x, weights)
    gradient = jax.grad(lambda p: _weighted(p, x, weights).mean_nll(y))(params)

    def step(layers, axis_name=None):
        tx = ko.spring(layers, learning_rate=0.1, damping=0.05, axis_name=axis_name)

        @jax.jit
        def update(params, state, x, weights):  # the parameters serve as the first gradient
            curvature = estimator.at(params, x, weights)
            _, state = tx.update(params, state, params, curvature=curvature)
            updates, state = tx.update(gradient, state, params, curvature=curvature)
            return updates, state[0].previous_update

        return tx.init(params), update

    state, update = step(None)
    expected = jax.device_get(update(params, state, x, weights))
    manual = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    for given in (None, layers):
        _, mine = step(given, "data")
        for check in (True, False) if given is None else (True,):
            mapped = jax.shard_map(mine, mesh=manual, check_vma=check, **specs)
            _same(jax.jit(mapped)(params, state, x, weights), expected)
        batch = jax.device_put((x, weights), NamedSharding(manual, P("data")))
        _same(step(given)[1](params, state, *batch), expected)
        with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",))):
            replicated = jax.device_put((params, state), P())
            batch = jax.device_put((x, weights), P("data"))
            _same(step(given)[1](*replicated, *batch), expected)


def examples():
    """Rows that devices join, and roots that move by means over all of them: updates of the whole
    batch, under `shard_map` and on explicit axes.
    """
    x, _, weights = _data()
    estimator, params = ko.ggn(_weighted), h.plain_params()
    layers = estimator.layers(params, x, weights)
    presets = (
        functools.partial(ko.skfac, rows=4 * EXAMPLES),  # a column for each of four classes
        functools.partial(ko.hylo, rank=6, selection="kid"),
        functools.partial(ko.singd, structure="block", size=3, root_rate=0.5),
    )

    def step(make, axis_name=None):
        tx = make(layers, damping=0.05, axis_name=axis_name)

        def update(params, x, weights):  # any gradient will do, so the parameters serve
            curvature = estimator.at(params, x, weights)
            return tx.update(params, tx.init(params), params, curvature=curvature, refresh=False)[0]

        return update

    manual = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((DEVICES,), ("data",))
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    for make in presets:
        expected = jax.device_get(jax.jit(step(make))(params, x, weights))
        mapped = jax.shard_map(step(make, "data"), mesh=manual, check_vma=True, **specs)
        _same(jax.jit(mapped)(params, x, weights), expected)
        with jax.set_mesh(explicit):
            arguments = jax.device_put(params, P()), *jax.device_put((x, weights), P("data"))
            _same(jax.jit(step(make))(*arguments), expected)


def in_microbatches():
    """Every microbatch has its share from every device; rows and weights are those of all."""
    x, _, weights = _data()
    estimator, params = ko.ggn(_weighted), h.plain_params()
    layers = estimator.layers(params, x, weights)
    presets = (
        functools.partial(ko.kfac_two_level, learning_rate=0.1),
        functools.partial(ko.skfac, rows=4 * EXAMPLES),  # which joins rows of all
    )

    def step(make, size, axis_name=None):
        tx = make(layers, damping=0.05, axis_name=axis_name)

        def update(params, x, weights):  # any gradient will do, so the parameters serve
            curvature = estimator.at(params, x, weights, microbatch_size=size)
            state = tx.init(params)
            return tx.update(params, state, params, curvature=curvature, refresh=True)[0]

        return update

    manual = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    for make in presets:
        expected = jax.device_get(jax.jit(step(make, None))(params, x, weights))
        batch = jax.device_put((x, weights), NamedSharding(manual, P("data")))
        _same(jax.jit(step(make, DEVICES))(params, *batch), expected)
        mapped = jax.shard_map(step(make, 1, "data"), mesh=manual, check_vma=True, **specs)
        _same(jax.jit(mapped)(params, x, weights), expected)
        with jax.set_mesh(jax.make_mesh((DEVICES,), ("data",))):
            arguments = jax.device_put(params, P()), *jax.device_put((x, weights), P("data"))
            _same(jax.jit(step(make, DEVICES))(*arguments), expected)
            with pytest.raises(ValueError, match="expected a multiple of the number of devices"):
                step(make, 4)(*arguments)


CHECKS = {
    check.__name__: check
    for check in (
        auto_axes,
        auto_axes_sharded_parameters,
        pmap,
        explicit_axes,
        explicit_axes_part_of_the_batch,
        explicit_axes_sampled_labels,
        shard_map,
        shard_map_schedule,
        shard_map_without_weight,
        shard_map_sampled_labels,
        every_layer_auto_axes,
        every_layer_shard_map,
        couplings,
        shard_map_adaptive,
        online,
        means,
        moments,
        samples,
        examples,
        power_steps,
        in_microbatches,
    )
}
OF_ALL_FILES = {
    name: check
    for checks in (
        CHECKS,
        placement_checks.CHECKS,
        placement_checks.SLOW,
        local_statistics_checks.CHECKS,
        local_statistics_checks.SLOW,
        model_parallel_checks.CHECKS,
        catalogue_checks.CHECKS,
        own_gradient_checks.CHECKS,
        preset_checks.CHECKS,
        wide_layer_checks.CHECKS,
    )
    for name, check in checks.items()
}


def main(names):
    """Runs the checks, all of them, and says which passed."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    assert jax.device_count() == DEVICES
    for name in names:
        try:
            OF_ALL_FILES[name]()
        except Exception:
            traceback.print_exc()
        else:
            print("passed", name)


if __name__ == "__main__":
    main(sys.argv[1:])
