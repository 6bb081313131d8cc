"""Estimators against dense references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import kfac_optax as ko
from kfac_optax.couplings.coarse import coarse_matrix
from kfac_optax.estimators import curvature, spec
from tests import oracles

SIZES = (3, 4, 2)
N = 6


@functools.cache
def problem():
    params = oracles.make_params(0, SIZES)
    return params, oracles.normal(1, (N, 3)), jnp.asarray([0, 1, 1, 0, 1, 0])


def categorical(params, x):
    return ko.Categorical(oracles.forward(params, x)[0])


def measure(estimator, params, *args, key=None, coupling=None):
    plan = oracles.plan(estimator.layers(params, *args), coupling, jnp.float64)
    return jax.jit(lambda p, a, k: estimator.at(p, *a, key=k).statistics(plan))(params, args, key)


def dense_rows(params, x, seeds):
    return oracles.per_example(params, x, seeds)


def columns(params, x):
    return jnp.asarray(oracles.softmax_columns(oracles.forward(params, x)[0]))


def assert_factors(measured, a, g, rtol=1e-10):
    big_a, big_g = oracles.cross_factors(a, g)
    for i, m in enumerate(measured):
        np.testing.assert_allclose(m.inputs[0], big_a[i][i], rtol=rtol, atol=1e-13)
        np.testing.assert_allclose(m.outputs[0], big_g[i][i], rtol=rtol, atol=1e-13)


def test_sampled_fisher_tends_to_the_ggn_and_more_samples_are_averaged(x64):
    params, x, _ = problem()
    exact, _ = measure(ko.ggn(categorical), params, x)
    few, _ = measure(ko.fisher(categorical, samples=4), params, x, key=jax.random.key(0))
    many, _ = measure(ko.fisher(categorical, samples=4000), params, x, key=jax.random.key(0))
    for e, f, m in zip(exact, few, many):
        np.testing.assert_allclose(m.inputs, e.inputs, rtol=1e-12)  # inputs do not depend on labels
        error = lambda s: np.linalg.norm(s.outputs - e.outputs) / np.linalg.norm(e.outputs)
        assert error(m) < 0.05 < error(f)


def test_different_keys_draw_different_labels(x64):
    params, x, _ = problem()
    one, two = (
        measure(ko.fisher(categorical), params, x, key=jax.random.key(k))[0] for k in (0, 1)
    )
    assert np.abs(one[1].outputs - two[1].outputs).max() > 1e-3


@pytest.mark.parametrize("kind", ["fisher", "ggn", "empirical"])
def test_vector_product_equals_the_dense_matrix(x64, kind):
    params, x, y = problem()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    if kind == "empirical":
        estimator, args = ko.empirical_fisher(lambda p, x, y: categorical(p, x).nll(y)), (x, y)
        seeds = (jax.nn.softmax(oracles.forward(params, x)[0]) - jax.nn.one_hot(y, 2))[None]
    else:
        estimator, args = (ko.fisher if kind == "fisher" else ko.ggn)(categorical), (x,)
        seeds = columns(params, x)
    # dense Fisher in the order of ravel_pytree (bias before kernel), from per-example gradients
    jacobian = jax.jacobian(lambda v: oracles.forward(unravel(v), x, tapped=False)[0])(flat)
    rows = np.einsum("cno,nod->cnd", seeds, jacobian)
    dense = np.einsum("cni,cnj->ij", rows, rows) / N
    v = oracles.normal(3, flat.shape)
    product = jax.jit(lambda p, v: estimator.vector_product(p, unravel(v), *args))(params, v)
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(product)[0], dense @ v, rtol=1e-9, atol=1e-12
    )


def test_blocks_equal_the_exact_ggn_on_deep_linear_nets(x64):
    """Gaussian likelihood and a linear net: G does not depend on the data, so A (x) G is the GGN
    block itself.
    """
    params = oracles.make_params(0, (3, 4, 4, 2))
    x = oracles.normal(1, (N, 3))
    linear = lambda p, x: oracles.forward(p, x, activation=lambda s: s)[0]
    estimator = ko.ggn(lambda p, x: ko.Normal(linear(p, x), 0.5))
    measured, _ = measure(estimator, params, x)
    seeds = jnp.broadcast_to(jnp.eye(2)[:, None] / 0.5, (2, N, 2))
    a, g = oracles.per_example(params, x, seeds, activation=lambda s: s)
    exact = oracles.exact_fisher(a, g)
    start = 0
    for m in measured:
        block = np.kron(m.inputs[0], m.outputs[0])
        n = len(block)
        np.testing.assert_allclose(
            block, exact[start : start + n, start : start + n], rtol=1e-10, atol=1e-12
        )
        start += n
    # with one example the block is exact for any net and likelihood
    params, x, _ = problem()
    one, _ = measure(ko.ggn(oracles.regressor), params, x[:1])
    a, g = oracles.per_example(params, x[:1], jnp.eye(2)[:, None])
    exact = oracles.exact_fisher(a, g)
    n = one[0].inputs.shape[-1] * one[0].outputs.shape[-1]
    np.testing.assert_allclose(
        np.kron(one[0].inputs[0], one[0].outputs[0]), exact[:n, :n], rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("coarse", ["factored", "exact"])
def test_coarse_matrix_equals_the_dense_restriction(x64, coarse):
    params, x, _ = problem()
    coupling = ko.coarse_correction(coarse)
    _, across = measure(ko.ggn(categorical), params, x, coupling=coupling)
    a, g = oracles.per_example(params, x, columns(params, x))
    whole = oracles.kronecker_fisher(a, g) if coarse == "factored" else oracles.exact_fisher(a, g)
    z = oracles.restriction(oracles.block_sizes(a, g))
    np.testing.assert_allclose(coarse_matrix(across), z @ whole @ z.T, rtol=1e-10, atol=1e-13)


def test_factored_and_exact_coarse_agree_on_one_example(x64):
    params, x, y = problem()
    loss = lambda p, x, y: categorical(p, x).nll(y)
    got = []
    for coarse in ("factored", "exact"):
        coupling = ko.coarse_correction(coarse)
        _, across = measure(ko.empirical_fisher(loss), params, x[:1], y[:1], coupling=coupling)
        got.append(coarse_matrix(across))
    np.testing.assert_allclose(got[0], got[1], rtol=1e-12)


@pytest.mark.parametrize("estimator", ["ggn", "fisher"])
def test_masked_examples_count_as_dropped(x64, estimator):
    params, x, _ = problem()
    mask = jnp.asarray([1, 1, 0, 1, 0, 0])
    poisoned = x.at[2].set(1e6)
    weighted = lambda p, x, w: ko.Categorical(oracles.forward(p, x)[0], weights=w)
    make = ko.ggn if estimator == "ggn" else functools.partial(ko.fisher, samples=3000)
    key = None if estimator == "ggn" else jax.random.key(0)
    coupling = ko.coarse_correction()
    got = measure(make(weighted), params, poisoned, mask, key=key, coupling=coupling)
    kept = measure(make(categorical), params, x[mask == 1], key=key, coupling=coupling)
    rtol = 1e-10 if estimator == "ggn" else 0.1  # other draws for the same examples
    for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(kept)):
        np.testing.assert_allclose(u, v, rtol=rtol, atol=1e-13 if estimator == "ggn" else 0.02)


def test_integer_weights_count_as_repeated_examples(x64):
    params, x, _ = problem()
    weights = jnp.asarray([1.0, 3.0, 0.0, 2.0, 0.0, 1.0])
    weighted = lambda p, x, w: ko.Categorical(oracles.forward(p, x)[0], weights=w)
    repeated = jnp.repeat(x, weights.astype(int), axis=0)
    for coarse in ("factored", "exact"):
        coupling = ko.coarse_correction(coarse)
        got = measure(ko.ggn(weighted), params, x, weights, coupling=coupling)
        expected = measure(ko.ggn(categorical), params, repeated, coupling=coupling)
        for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
            np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-13)


def test_heads_add_up_and_token_terms_follow_the_mean_loss(x64):
    """Independent heads: G is the sum of theirs. `[N, R]` terms: the curvature of the mean over all
    terms.
    """
    params, x, _ = problem()

    def heads(p, x):
        out = oracles.forward(p, x)[0]
        return {"class": ko.Categorical(out), "value": [ko.Normal(out, 2.0)]}

    both, _ = measure(ko.ggn(heads), params, x)
    one, _ = measure(ko.ggn(categorical), params, x)
    two, _ = measure(ko.ggn(lambda p, x: ko.Normal(oracles.forward(p, x)[0], 2.0)), params, x)
    for b, u, v in zip(both, one, two):
        np.testing.assert_allclose(b.inputs, u.inputs, rtol=1e-12)
        np.testing.assert_allclose(b.outputs, u.outputs + v.outputs, rtol=1e-10, atol=1e-13)

    tokens = x.reshape(2, 3, 3)
    per_token, _ = measure(ko.ggn(categorical), params, tokens)
    for t, u in zip(per_token, one):
        np.testing.assert_allclose(
            np.kron(t.inputs[0], t.outputs[0]),
            np.kron(u.inputs[0], u.outputs[0]),
            rtol=1e-10,
            atol=1e-13,
        )


def test_subsample_keeps_spaced_examples_of_every_batched_argument(x64):
    params, x, _ = problem()
    weighted = lambda p, x, w, scale: ko.Categorical(scale * oracles.forward(p, x)[0], weights=w)
    weights, scale = jnp.arange(1.0, N + 1), jnp.float64(2.0)
    half = measure(ko.ggn(weighted, subsample=0.5), params, x, weights, scale)
    expected = measure(ko.ggn(weighted), params, x[::2], weights[::2], scale)
    own = measure(
        ko.ggn(weighted, subsample=lambda x, w, s: (x[3:], w[3:], s)), params, x, weights, scale
    )
    tail = measure(ko.ggn(weighted), params, x[3:], weights[3:], scale)
    # so many examples: the same ones as a fraction, and all of a batch with fewer
    counted = measure(ko.ggn(weighted, subsample=len(x[::2])), params, x, weights, scale)
    few = measure(ko.ggn(weighted, subsample=np.int64(N + 1)), params, x, weights, scale)
    every = measure(ko.ggn(weighted), params, x, weights, scale)
    for got, want in ((half, expected), (own, tail), (counted, half), (few, every)):
        for u, v in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(u, v, rtol=1e-12)


@pytest.mark.parametrize(
    ("examples", "outputs", "kept"),
    [(2, 1, 2), (2, 6, 3), (2, 7, 4), (N, 1, N), (1, 10**6, N)],
)
def test_enough_of_the_batch_for_so_many_examples_and_outputs(
    x64, monkeypatch, examples, outputs, kept
):
    least = spec.Enough(examples, outputs)
    monkeypatch.setattr(spec.part_of_batch, "__defaults__", (least, 1))
    monkeypatch.setattr(curvature, "PRODUCTS", least)
    params, x, _ = problem()
    got = measure(ko.ggn(categorical, subsample="auto"), params, x)
    want = measure(ko.ggn(categorical, subsample=max(kept, 2)), params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), got, want)
    # products of a whole estimator on their part; a function of the user's goes first
    form = ko.ggn(categorical).at(params, x).quadratic_form((params,), subsample="auto")
    part = ko.ggn(categorical).at(params, x).quadratic_form((params,), subsample=max(kept, 2))
    np.testing.assert_allclose(form, part, rtol=1e-12)
    own = ko.ggn(categorical, subsample=lambda x: (x[:2],)).at(params, x)
    of_two = own.quadratic_form((params,), subsample="auto")
    np.testing.assert_allclose(of_two, own.quadratic_form((params,)), rtol=1e-12)


@pytest.mark.parametrize(
    ("cases", "outputs", "examples", "kept"),
    [(8, 1, 1, 2), (9, 1, 1, 3), (8, 17, 1, 3), (8, 1, 4, 4), (1000, 1, 1, N)],
)
def test_positions_of_an_example_are_predictions_of_their_own(x64, cases, outputs, examples, kept):
    """Four positions of two numbers each: eight numbers an example."""
    params, x, _ = problem()
    texts = jnp.repeat(x[:, None], 4, axis=1)
    mine = ko.ggn(categorical, subsample="auto").spec
    assert categorical(params, texts).batch_shape == (N, 4)
    least = spec.Enough(cases, outputs, examples)
    (part,) = spec.part_of_batch(mine, params, (texts,), least)
    assert len(part) == kept
    # each of the batch shape has its own loss, whatever the numbers behind it
    (part,) = spec.part_of_batch(mine, params, (x,), spec.Enough(N - 1, 1))
    assert len(part) == N - 1


def test_a_short_text_is_not_taken_for_many_examples():
    """What the defaults make of 32 texts of 64 characters, and of batches of single predictions."""

    def kept(least, size, *shape):
        function = lambda p, x: ko.Categorical(x * p)
        mine = ko.ggn(function, subsample="auto").spec
        (part,) = spec.part_of_batch(mine, jnp.float32(1), (jnp.zeros((size, *shape)),), least)
        return len(part)

    defaults = (spec.STATISTICS, spec.PRODUCTS, spec.FEW)
    assert [kept(least, 32, 64, 96) for least in defaults] == [16, 8, 6]
    assert [kept(least, 16, 128, 96) for least in defaults] == [16, 8, 3]
    assert [kept(least, 1000, 784) for least in defaults] == [256, 128, 42]
    assert [kept(least, 128, 10) for least in defaults] == [128, 128, 128]


def test_enough_is_whole_microbatches_and_all_of_what_is_no_plain_batch(x64, monkeypatch):
    least = spec.Enough(2, 1)
    monkeypatch.setattr(curvature, "PRODUCTS", least)
    params, x, _ = problem()
    lazy = ko.ggn(categorical).at(params, x, microbatch_size=3)
    form = functools.partial(lazy.quadratic_form, (params,))
    np.testing.assert_allclose(form(subsample="auto"), form(subsample=3), rtol=1e-12)

    # nodes with edges or neighbours, given or in the model, steps in time before one prediction (as
    # many as examples too), numbers of channels in front
    edges = jnp.asarray([0, 2, 5, 5]), jnp.asarray([1, 1, 3, 0])
    graph = lambda p, x, there, here: categorical(p, x.at[here].add(x[there]))
    neighbours = lambda p, x, matrix: categorical(p, matrix @ x)
    known = lambda p, x: categorical(p, jnp.eye(N) @ x)
    sources = lambda p, x, matrix: categorical(p, matrix.T @ x)
    steps = lambda p, x: categorical(p, jnp.sum(x, axis=0))
    shifted = lambda p, shift, x: categorical(p, x + shift)
    in_time = oracles.normal(2, (5, N, 3))
    for function, args in (
        (graph, (x, *edges)),
        (neighbours, (x, jnp.eye(N))),
        (sources, (x, jnp.eye(N))),
        (known, (x,)),
        (steps, (in_time,)),
        (steps, (oracles.normal(2, (N, N, 3)),)),
        (shifted, (jnp.arange(3.0), x)),
    ):
        mine = ko.ggn(function, subsample="auto").spec
        kept = spec.part_of_batch(mine, params, args, least)
        assert all(got is whole for got, whole in zip(kept, args, strict=True))

    # examples that are as long as they are many come apart all the same
    long = lambda p, x: categorical(p, x[:, :3])
    (kept,) = spec.part_of_batch(ko.ggn(long, subsample="auto").spec, params, (jnp.eye(N),), least)
    np.testing.assert_array_equal(kept, jnp.eye(N)[np.array([0, N // 2])])


def test_forward_only_measures_inputs_and_needs_no_backward_pass(x64):
    params, x, _ = problem()
    estimator = ko.forward_only(categorical)
    measured, _ = measure(estimator, params, x)
    a, _ = oracles.per_example(params, x, columns(params, x))
    for m, rows in zip(measured, a):
        np.testing.assert_allclose(m.inputs[0], rows.T @ rows / N, rtol=1e-12)
        np.testing.assert_array_equal(m.outputs[0], np.eye(m.outputs.shape[-1]))
    product = jax.jit(estimator.vector_product)(params, params, x)
    expected = (a[0].T @ a[0] / N) @ np.concatenate(
        [params["layer0"]["kernel"], params["layer0"]["bias"][None]]
    )
    np.testing.assert_allclose(product["layer0"]["kernel"], expected[:-1], rtol=1e-12)
    np.testing.assert_allclose(product["layer0"]["bias"], expected[-1], rtol=1e-12)
    # compiled, the matmuls left are the forward pass (two) and the input products (two)
    plan = oracles.plan(estimator.layers(params, x), None, jnp.float64)
    text = (
        jax.jit(lambda p, x: estimator.at(p, x).statistics(plan))
        .lower(params, x)
        .compile()
        .as_text()
    )
    assert 0 < text.count(" dot(") + text.count("__onednn$matmul") <= 4


def test_forward_only_cannot_feed_the_coarse_level(x64):
    params, x, _ = problem()
    with pytest.raises(ValueError, match="measures no output gradients"):
        measure(ko.forward_only(categorical), params, x, coupling=ko.coarse_correction())


@pytest.mark.parametrize("scan", [False, True])
def test_value_and_grad_shares_the_forward_pass(x64, scan):
    params, x, y = problem()
    calls = []

    def model(p, x):
        calls.append(1)
        if not scan:
            return oracles.forward(p, x)[0]
        layer = p["layer1"]  # the same layer over time, and the stack {0: ..., 1: ...} of one

        def body(c, e):
            s = ko.tap_dense(c @ e["kernel"], c, e["kernel"])
            return jnp.tanh(s), None

        h, _ = jax.lax.scan(body, x, {"kernel": p["stack"]})
        out, _ = jax.lax.scan(
            lambda c, _: (jnp.tanh(ko.tap_dense(c @ p["w"], c, p["w"])), None), h, None, length=3
        )
        return ko.tap_dense(
            out @ layer["kernel"] + layer["bias"], out, layer["kernel"], layer["bias"]
        )

    if scan:
        params = {
            "stack": oracles.normal(4, (2, 3, 3)),
            "w": oracles.normal(5, (3, 3)),
            "layer1": params["layer1"] | {"kernel": oracles.normal(6, (3, 2))},
        }
    predict = lambda p, x: ko.Categorical(model(p, x))
    expected = jax.jit(jax.value_and_grad(lambda p: predict(p, x).mean_nll(y)))(params)
    for coupling in (ko.coarse_correction("factored"), ko.coarse_correction("exact")):
        for estimator, key in (
            (ko.ggn(predict), None),
            (ko.fisher(predict, samples=2), jax.random.key(3)),
        ):
            plan = oracles.plan(estimator.layers(params, x), coupling, jnp.float64)
            step = estimator.value_and_grad(lambda dist, y: dist.mean_nll(y))

            @jax.jit
            def shared(p, x, y, step=step, plan=plan, key=key):
                loss, grads, curvature = step(p, x, targets=y, key=key)
                return loss, grads, curvature.statistics(plan)

            loss, grads, statistics = shared(params, x, y)
            lazy = jax.jit(
                lambda p, x, e=estimator, k=key, plan=plan: e.at(p, x, key=k).statistics(plan)
            )(params, x)
            for u, v in zip(
                jax.tree.leaves((loss, grads, statistics)), jax.tree.leaves((*expected, lazy))
            ):
                np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-13)


def test_aux_comes_next_to_the_loss(x64):
    """Batch statistics and logits out of the one forward pass, while everything else sees the
    prediction only.
    """
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False), nn.Dense(2)])
    x, y = oracles.normal(0, (N, 3)), jnp.arange(N) % 2
    variables = model.init(jax.random.key(0), x)
    params, stats = jax.tree.map(
        lambda v: v.astype(jnp.float64), (variables["params"], variables["batch_stats"])
    )

    def both(p, stats, x):
        logits, new = model.apply({"params": p, "batch_stats": stats}, x, mutable=["batch_stats"])
        return ko.Categorical(logits), (logits, new["batch_stats"])

    plain, estimator = ko.ggn(lambda *args: both(*args)[0]), ko.ggn(both, has_aux=True)
    layers = estimator.layers(params, stats, x)
    assert str(layers) == str(plain.layers(params, stats, x))
    vector = jax.tree.map(jnp.ones_like, params)
    close = lambda u, v: jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), u, v
    )
    close(
        estimator.vector_product(params, vector, stats, x),
        plain.vector_product(params, vector, stats, x),
    )

    @jax.jit
    def shared(params):
        step = estimator.value_and_grad(lambda prediction, y: prediction.mean_nll(y))
        (loss, aux), grads, curvature = step(params, stats, x, targets=y)
        plan = oracles.plan(layers, None, jnp.float64)
        return (
            loss,
            aux,
            grads,
            curvature.statistics(plan),
            estimator.at(params, stats, x).statistics(plan),
        )

    loss, aux, grads, statistics, lazy = shared(params)
    value, gradient = jax.value_and_grad(lambda p: both(p, stats, x)[0].mean_nll(y))(params)
    close((loss, aux, grads, statistics), (value, both(params, stats, x)[1], gradient, lazy))


def test_statistics_of_halves_average_to_the_whole(x64):
    params, x, _ = problem()
    whole, _ = measure(ko.ggn(categorical), params, x)
    first, _ = measure(ko.ggn(categorical), params, x[:3])
    second, _ = measure(ko.ggn(categorical), params, x[3:])
    for w, u, v in zip(*map(jax.tree.leaves, (whole, first, second))):
        np.testing.assert_allclose(w, (u + v) / 2, rtol=1e-10, atol=1e-13)


def test_many_columns_are_accumulated_in_chunks(x64):
    params = oracles.make_params(0, (3, 11))
    x = oracles.normal(1, (N, 3))
    (measured,), _ = measure(ko.ggn(categorical), params, x)  # 11 columns, more than a chunk
    y = np.asarray(jax.nn.softmax(oracles.forward(params, x)[0]))
    expected = (np.einsum("nc,cd->cd", y, np.eye(11)) - y.T @ y) / N
    np.testing.assert_allclose(measured.outputs[0], expected, rtol=1e-10, atol=1e-14)


ERRORS = [
    (lambda p, x: ko.fisher(categorical).at(p, x), ValueError, "Pass key=jax.random.key"),
    (
        lambda p, x: ko.fisher(lambda p, x: oracles.forward(p, x)[0]).layers(p, x),
        TypeError,
        "expected a likelihood or a tree",
    ),
    (
        lambda p, x: ko.fisher(lambda p, x: (oracles.forward(p, x), {})[1]).layers(p, x),
        TypeError,
        "expected a likelihood or a tree",
    ),
    (
        lambda p, x: ko.empirical_fisher(lambda p, x: oracles.forward(p, x)[0]).layers(p, x),
        TypeError,
        "one loss per example",
    ),
    (
        lambda p, x: ko.fisher(lambda p, x: ko.Normal(x @ jnp.sin(p["layer0"]["kernel"]))).layers(
            p, x
        ),
        ValueError,
        "no layer found.*tap_dense",
    ),
    (
        lambda p, x: ko.fisher(categorical, samples=0),
        ValueError,
        "samples=0; expected samples >= 1",
    ),
    (lambda p, x: ko.fisher(categorical, subsample=1.5), ValueError, "subsample=1.5"),
    (lambda p, x: ko.ggn(categorical, subsample="half"), ValueError, "subsample='half'; .* 'auto'"),
    (lambda p, x: ko.ggn(categorical, subsample=1), ValueError, "subsample=1; .* at least 2"),
    (lambda p, x: ko.ggn(categorical, subsample=True), ValueError, "subsample=True; .* at least 2"),
    (lambda p, x: ko.quadratic_step(subsample=0), ValueError, "quadratic_step: subsample=0; "),
    (
        lambda p, x: ko.ggn(categorical, subsample=0.5).value_and_grad(lambda d, y: 0.0),
        ValueError,
        "part of the batch",
    ),
    (
        lambda p, x: ko.fisher(categorical, has_aux=True).layers(p, x),
        TypeError,
        "returned Categorical; expected a pair",
    ),
    (lambda p, x: ko.fisher("model"), TypeError, "expected a function"),
    (lambda p, x: ko.tap_dense(x, x, x), ValueError, "expected s .*batch, q"),
    (lambda p, x: ko.tap_dense(x, x, jnp.eye(3), jnp.ones(2)), ValueError, "one value per output"),
    (lambda p, x: ko.tap_dense(x[:2], x, jnp.eye(3)), ValueError, "expected the same rows"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_wrong_use_is_named(call, error, message):
    params, x, _ = problem()
    with pytest.raises(error, match=f"(?s){message}"):
        call(params, x)


def test_weights_that_do_not_fit_a_layer_and_heads_that_disagree_raise(x64):
    params, x, _ = problem()
    pooled = lambda p, x, w: ko.Categorical(
        jnp.broadcast_to(oracles.forward(p, x)[0][:, None], (N, 4, 2)), weights=w
    )
    with pytest.raises(ValueError, match="layer 'layer0': weights of shape"):
        measure(ko.ggn(pooled), params, x, jnp.ones((N, 4)))
    uneven = lambda p, x, w: [
        ko.Categorical(oracles.forward(p, x)[0], weights=w),
        ko.Normal(oracles.forward(p, x)[0]),
    ]
    with pytest.raises(ValueError, match="heads have weights of shapes"):
        measure(ko.ggn(uneven), params, x, jnp.ones(N))
