"""Blocks that do not keep to the protocol: the error names function, shape got and expected."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import kfac_optax as ko

ESTIMATOR = ko.ggn(lambda w, x: ko.Normal(ko.tap_dense(x @ w, x, w)))
W, X = jnp.zeros((3, 2)), jnp.ones((4, 3))
LAYERS = ESTIMATOR.layers(W, X)
GOOD = ko.kronecker("cholesky")
HERE = "scale_by_curvature: block 'mine' of dense_3x2: "


def make(**change):
    block = GOOD._replace(name="mine", **change)
    return ko.kfac(LAYERS, kl_clip=None, block=block)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(solve=lambda inverse, v, damping: v.T),
            "solve(inverse, V, damping) returned float32[2,3]; expected float32[3,2], what V is.",
        ),
        (
            dict(solve=lambda inverse, v, damping: v[0]),
            "solve(inverse, V, damping) returned float32[2]; expected float32[3,2]",
        ),
        (
            dict(solve=lambda inverse, v, damping: v.astype(jnp.bfloat16)),
            "solve(inverse, V, damping) returned bfloat16[3,2]; expected float32[3,2]",
        ),
        (
            dict(factorize=lambda statistic, damping: None),
            "factorize(statistic, damping) returned None; expected a tree with at least one array",
        ),
        (
            dict(refresh=lambda inverse, statistic, damping, count: statistic.inputs),
            "refresh(inverse, statistic, damping, count) returned float32[3,3]; expected "
            "DenseInverse(.inputs float32[3,3], .outputs float32[2,2]), what factorize returned.",
        ),
        (
            dict(due=lambda inverse, statistic, damping, count: (count > 0, statistic)),
            "due(inverse, statistic, damping, count) returned tuple([0] bool[], [1].inputs "
            "float32[3,3], [1].outputs float32[2,2]); expected tuple(",
        ),
    ],
    ids=["transposed", "reduced", "dtype", "nothing", "refresh", "due"],
)
def test_init_names_the_function(change, message):
    with pytest.raises(ValueError, match=re.escape(HERE + message)):
        make(**change).init(W)


def test_a_statistic_of_another_shape_is_not_broadcast():
    def measure(a, g, use):
        full = GOOD.measure(a, g, use)
        return full._replace(inputs=full.inputs[:1])

    tx = make(measure=measure)
    state = tx.init(W)
    message = (
        "scale_by_curvature.update: block 'mine' of dense_3x2: measure(a, g, use) returned "
        "Factors(.inputs float32[1,1,3], .outputs float32[1,2,2]); expected Factors(.inputs "
        "float32[1,3,3], .outputs float32[1,2,2]), what init returned"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(W, state, W, curvature=ESTIMATOR.at(W, X))


def test_nothing_is_computed_for_the_check():
    """Shapes alone are looked at: a block that counts its runs sees tracers only."""
    seen = []

    def factorize(statistic, damping):
        seen.append(isinstance(jax.tree.leaves(statistic)[0], jax.core.Tracer))
        return GOOD.factorize(statistic, damping)

    make(factorize=factorize).init(W)
    assert seen and all(seen)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_factorisation_that_half_precision_lacks_is_named(dtype):
    message = (
        rf"kronecker \(cholesky\).*dense_3x2.*in {dtype}, the factor_dtype.*Leave factor_dtype"
    )
    with pytest.raises(ValueError, match=message):
        ko.kfac(LAYERS, kl_clip=None, inverse="cholesky", factor_dtype=dtype).init(W)
    with pytest.raises(TypeError, match="factor_dtype='int32'; expected a dtype of floating"):
        ko.kfac(LAYERS, kl_clip=None, factor_dtype="int32")
    # nothing is factorised
    state = ko.eva(LAYERS, kl_clip=None, factor_dtype=dtype).init(W)
    factors = jax.tree.leaves(optax.tree.get(state, "factors"))
    assert {x.dtype.name for x in factors} == {dtype}


def test_half_precision_is_asked_for_inside_shard_map_too():
    params = {"w": jnp.ones((2, 3))}
    estimator = ko.ggn(lambda p, x: ko.Normal(ko.tap_dense(x @ p["w"], x, p["w"])))
    layers = estimator.layers(params, jnp.ones((4, 2)))
    mesh = jax.make_mesh((1,), ("data",))
    none = jax.sharding.PartitionSpec()

    def init(block):
        tx = ko.kfac(layers, block=block, kl_clip=None, factor_dtype=jnp.bfloat16)
        mapped = jax.shard_map(tx.init, mesh=mesh, in_specs=none, out_specs=none)
        return jax.eval_shape(mapped, params), jax.eval_shape(tx.init, params)

    inside, outside = init(ko.rank_one())
    assert jax.tree.map(jnp.shape, inside) == jax.tree.map(jnp.shape, outside)
    with pytest.raises(ValueError, match="cannot be computed in bfloat16"):
        init(ko.kronecker())
