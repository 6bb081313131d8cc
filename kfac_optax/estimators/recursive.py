"""Curvature that goes from layer to layer by a recursion instead of backward passes: KFRA and the
backpropagated metric.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfac_optax._tree import gather, make_buckets, named_leaves
from kfac_optax._types import Block, Layer, Layers, PyTree, Use
from kfac_optax.blocks.kronecker.kronecker import Factors
from kfac_optax.capture.chain import Chain, chain_of
from kfac_optax.estimators.curvature import LazyCurvature
from kfac_optax.estimators.estimator import Estimator
from kfac_optax.estimators.fisher import check_spec
from kfac_optax.estimators.heads import GGN, Kind, Weights, find_weights, split_outputs
from kfac_optax.estimators.layer_rows import layer_rows
from kfac_optax.estimators.plan import Plan, match_layers
from kfac_optax.estimators.spec import Spec, part_of_batch, trace_model
from kfac_optax.linalg.gram import gram
from kfac_optax.linalg.weighted_rows import keep_rows, weighted_gram

RECURSIVE = GGN._replace(name="recursive_ggn")
BACKPROPAGATED = GGN._replace(name="backpropagated_metric")


def recursive_ggn(
    predict: Callable[..., PyTree], *, subsample: float | Callable | None = None
) -> Estimator:
    """KFRA: Kronecker factors of the Gauss-Newton matrix by a recursion through the layers, without
    a backward pass per output.

    `A_l = E[a a^T]` as ever. The output factor `H_l [q_l, q_l]` is the exact mean
    `(1/N) sum_b J_b^T H_b J_b` of the last layer's output, and that of the layer before is made of
    its expectation, `H_l = (W_{l+1} H_{l+1} W_{l+1}^T) * E[f'(s_l) f'(s_l)^T]` for weights
    `[inputs, outputs]` and activations `f`. Exact for one example, and for linear chains on any
    batch; in between it is an approximation that `ggn` (KFLR) does not make.

    For chains of dense layers with activations that act on each entry alone; other models are
    refused, by the layer and the operation behind it. Only blocks made of both factors
    (`kronecker`) can be measured. Products with vectors and quadratic forms are those of `ggn`.

    Args:
      predict: `(params, *args) -> likelihood`, or a tree of likelihoods.
      subsample: as in `fisher`.

    Returns:
      An `Estimator`, without `value_and_grad`.

    Raises:
      ValueError: a fraction outside (0, 1]; in `layers` and in updates, a model that is no chain.

    >>> import kfac_optax as ko
    >>> estimator = recursive_ggn(lambda p, x: ko.Normal(jnp.tanh(x @ p["v"]) @ p["w"]))
    >>> params, x = {"v": jnp.zeros((1, 1)), "w": jnp.full((1, 1), 2.0)}, jnp.ones((4, 1))
    >>> tx = ko.kfac(estimator.layers(params, x), kl_clip=None, inverse_every=1, damping=0.0)
    >>> grads = {"v": jnp.ones((1, 1)), "w": jnp.ones((1, 1))}
    >>> curvature = estimator.at(params, x)
    >>> update, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
    >>> print(update["v"])  # A = 1, H = 2 * 2
    [[0.25]]

    Reference: Botev, Ritter & Barber, Practical Gauss-Newton Optimisation for Deep Learning (2017).
    """
    return _estimator(Spec(RECURSIVE, predict, 1, subsample))


def backpropagated_metric(
    predict: Callable[..., PyTree], *, subsample: float | Callable | None = None
) -> Estimator:
    """The backpropagated metric: how much each unit matters, by one backward pass of squared
    weights.

    A unit's weights have the metric `M_k = E[phi_k a a^T]` with, at the output,
    `phi = diag(H_b)`, and below it `phi_l = f'(s_l)^2 (phi_{l+1} (W_{l+1} * W_{l+1})^T)`. Equal to
    the diagonal of `ggn`'s output gradients for one hidden layer and one output; in general it
    leaves out how paths through different units correlate. For blocks that treat every unit on its
    own: `quasi_diagonal_block` and `unit_block`.

    For chains of dense layers, as `recursive_ggn`. Products with vectors are those of `ggn`.

    Args:
      predict: `(params, *args) -> likelihood`, or a tree of likelihoods.
      subsample: as in `fisher`.

    Returns:
      An `Estimator`, without `value_and_grad`.

    Raises:
      ValueError: a fraction outside (0, 1]; in `layers` and in updates, a model that is no chain.

    >>> import kfac_optax as ko
    >>> estimator = backpropagated_metric(lambda p, x: ko.Normal(jnp.tanh(x @ p["v"]) @ p["w"]))
    >>> params, x = {"v": jnp.zeros((1, 1)), "w": jnp.full((1, 1), 2.0)}, jnp.ones((4, 1))
    >>> tx = ko.quasi_diagonal(estimator.layers(params, x), damping=0.0)
    >>> grads = {"v": jnp.ones((1, 1)), "w": jnp.ones((1, 1))}
    >>> curvature = estimator.at(params, x)
    >>> update, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
    >>> print(update["v"])  # the slope of tanh at 0 is one: phi = 2 * 2
    [[0.25]]

    Reference: Ollivier, Riemannian Metrics for Neural Networks I: Feedforward Networks (2015).
    """
    return _estimator(Spec(BACKPROPAGATED, predict, 1, subsample))


def _estimator(spec: Spec) -> Estimator:
    check_spec(spec)
    return ChainEstimator(spec)


class ChainEstimator(Estimator):
    """An estimator whose statistics follow the layers of a chain."""

    def layers(self, params: PyTree, *args: PyTree) -> Layers:
        """As of any estimator; raises where the model is no chain."""
        found = super().layers(params, *args)
        args = part_of_batch(self.spec, params, args)
        traced = trace_model(self.spec, params, args)
        where = self.spec.kind.name
        # for its checks: nothing is computed
        jax.eval_shape(
            lambda inputs: chain_of(where, traced, inputs), jax.tree.leaves((params, args))
        )
        return found

    def at(
        self,
        params: PyTree,
        *args: PyTree,
        key: jax.Array | None = None,
        microbatch_size: int | None = None,
    ) -> LazyCurvature:
        """As of any estimator; there are no labels, and the key has no influence."""
        if microbatch_size is not None:
            raise ValueError(
                f"{self.spec.kind.name}.at: got microbatch_size={microbatch_size!r}; expected none, "
                "since a recursion goes on from means over the whole batch. Use subsample= for less "
                "memory, or ggn(predict)."
            )
        return ChainCurvature(params, args, key, self.spec)

    def value_and_grad(self, loss_fn: Any) -> Any:
        """Raises: there is no pass to share."""
        raise ValueError(
            f"{self.spec.kind.name}.value_and_grad: its statistics come from no backward pass that "
            "could be shared with the loss. Use .at(params, *args)."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChainCurvature(LazyCurvature):
    """A `Curvature` whose statistics are made by a recursion."""

    def statistics(self, plan: Plan) -> tuple[list[PyTree], PyTree]:
        """Statistics of the plan's layers, `[1, ...]` each; there is no coupling."""
        kind, args = self.spec.kind, part_of_batch(self.spec, self.params, self.args)
        _check_plan(kind, plan)
        traced = trace_model(self.spec, self.params, args)
        inputs = jax.tree.leaves((self.params, args))
        with jax.named_scope("kfac/measure"):
            # one pass forwards: inputs and slopes of all layers, and the prediction
            chain = chain_of(kind.name, traced, inputs)
            prediction = jax.tree.unflatten(jax.tree.structure(traced.out_shape), chain.outputs)
            _, heads = split_outputs(kind, prediction)
            weights = find_weights(kind, heads, plan.axis_name)
            # one pass backwards, through the last layer alone, for every column of the output
            order = [traced.layers.layers[i] for i in traced.owner]
            last = layer_rows(kind, traced, inputs, (order[-1],), axis_name=plan.axis_name)
            g = last[order[-1]].g[:, 0, :, 0]  # [columns, N, q]
            kernels = _kernels(order, self.params, plan.dtype)
            make = _recursive if kind == RECURSIVE else _backpropagated
            made = make(plan, chain, order, kernels, g.astype(plan.dtype), weights)
        if plan.axis_name is not None:
            made = jax.lax.pmean(made, plan.axis_name)
        return made, None


def _check_plan(kind: Kind, plan: Plan) -> None:
    """Raises where a block, or the coupling, cannot be made of what the recursion gives."""
    if plan.coupling is not None:
        raise ValueError(
            f"{kind.name}: got the coupling {plan.coupling.name!r}, which needs rows of all layers "
            "together; expected none. Use ggn(predict) with couplings."
        )
    for layer, block in zip(plan.layers, plan.blocks, strict=True):
        fits = block.per_unit if kind == BACKPROPAGATED else _of_two_factors(layer, block, plan)
        if layer.kind != "dense" or not fits:
            wanted = (
                "quasi_diagonal_block() or unit_block()"
                if kind == BACKPROPAGATED
                else "kronecker(), whose statistic is both factors"
            )
            raise ValueError(
                f"{kind.name}: layer {layer.path or '(root)'!r} of kind {layer.kind!r} has the "
                f"block {block.name!r}; expected a dense layer with {wanted}. Use ggn(predict) with "
                "other blocks."
            )


def _of_two_factors(layer: Layer, block: Block, plan: Plan) -> bool:
    if block.absorb is not None or block.rows or block.reads_inverse:
        return False
    return isinstance(jax.eval_shape(lambda: block.init(layer, plan.dtype)), Factors)


def _kernels(layers: Sequence[Layer], params: PyTree, dtype: Any) -> list[jax.Array]:
    """The weights `[inputs, outputs]` of all layers."""
    leaves = named_leaves(params)
    out = []
    for layer in layers:
        (bucket,) = make_buckets([layer])
        out.append(gather(bucket, leaves, dtype)[0, : layer.inputs])
    return out


def _positions(plan: Plan, order: Sequence[Layer], where: str) -> list[int]:
    """Where in the chain each layer of the plan is."""
    return match_layers(plan.layers, Layers(tuple(order)), where)


def _use(plan: Plan, layer: Layer, examples: int, weights: Weights) -> Use:
    return Use(layer, examples, examples, plan.dtype, weights.rows)


def _recursive(
    plan: Plan,
    chain: Chain,
    order: Sequence[Layer],
    kernels: Sequence[jax.Array],
    g: jax.Array,
    weights: Weights,
) -> list[PyTree]:
    """Both factors of every layer; the recursion goes on from means over all devices."""

    def mean(x: jax.Array) -> jax.Array:
        return x if plan.axis_name is None else jax.lax.pmean(x, plan.axis_name)

    # H_L = (1/N) sum_b sum_c g_bc g_bc^T, [q, q]; the root of the weight is inside g
    examples = g.shape[1]
    factors = [mean(gram(g, g) / examples)]
    for kernel, slope in zip(reversed(kernels[1:]), reversed(chain.slopes), strict=True):
        # H_l = (W H W^T) * E[f' f'^T], [inputs, inputs] of the layer behind
        slopes = mean(weighted_gram(slope.astype(plan.dtype), weights.rows) / examples)
        carried = jnp.matmul(kernel, factors[0], precision="highest")
        factors.insert(0, jnp.matmul(carried, kernel.T, precision="highest") * slopes)
    made = []
    where = _positions(plan, order, RECURSIVE.name)
    for layer, block, i in zip(plan.layers, plan.blocks, where, strict=True):
        # without output gradients a block measures its inputs alone
        inputs = block.measure(chain.inputs[i], None, _use(plan, layer, examples, weights)).inputs
        made.append(Factors(inputs[None], factors[i][None]))
    return made


def _backpropagated(
    plan: Plan,
    chain: Chain,
    order: Sequence[Layer],
    kernels: Sequence[jax.Array],
    g: jax.Array,
    weights: Weights,
) -> list[PyTree]:
    """What blocks make of rows whose squares are the moduli of units."""
    # phi_L = sum_c g_bc^2, [N, q], the diagonal of the last layer's H_b
    moduli = [jnp.sum(jnp.square(g), 0)]
    for kernel, slope in zip(reversed(kernels[1:]), reversed(chain.slopes), strict=True):
        back = jnp.matmul(moduli[0], jnp.square(kernel).T, precision="highest")
        # phi_l = f'^2 * (phi (W * W)^T); weights are in phi, but zero times NaN is not zero
        moduli.insert(0, jnp.square(keep_rows(slope.astype(plan.dtype), weights.rows)) * back)
    made = []
    where = _positions(plan, order, BACKPROPAGATED.name)
    for layer, block, i in zip(plan.layers, plan.blocks, where, strict=True):
        use = _use(plan, layer, g.shape[1], weights)
        made.append(block.measure(chain.inputs[i], jnp.sqrt(moduli[i]), use))
    return [jax.tree.map(lambda x: x[None], statistic) for statistic in made]
