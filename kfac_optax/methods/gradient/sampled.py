"""Gradients at labels drawn from the model, handed to `update` beside the gradient."""

import jax
import jax.numpy as jnp

from kfac_optax._tree import named_leaves
from kfac_optax._types import Numeric
from kfac_optax.methods.gradient.axes import gather
from kfac_optax.methods.gradient.axiswise import Step


def sampled_tensors(step: Step, examples: Numeric | None) -> dict[str, jax.Array]:
    """Tensors of `sampled_grads` by group, `[N, copies, *block]`, whose mean product is the Fisher.

    Of a mean over `examples` that is one tensor, times the root of their number.

    Raises:
      ValueError: there are none, or not of the shapes that the parameters have.
    """
    given = step.extra.get("sampled_grads")
    if given is None:
        raise ValueError(
            f"{step.where}.update got no `sampled_grads`. Pass gradients at labels drawn from the "
            "model in every step,\n\n"
            "    tx.update(grads, state, params, sampled_grads=fisher.at(params, x, key=key)"
            ".sampled_gradient())\n\n"
            "with examples= the number of examples in x, or gradients of single examples."
        )
    # by name, so that leaves may come in another order
    leaves, own, tensors = named_leaves(given), named_leaves(step.updates), {}
    for group in step.groups:
        for view in group.views:
            name = view.name
            tensors[name] = _checked(step.where, name, leaves, own[name], examples)
    sizes = {name: x.shape[0] for name, x in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{step.where}.update: leaves of sampled_grads have {sizes} examples; expected the "
            "same number of all."
        )
    # of a mean over N examples sqrt(N) times it, whose product has the Fisher for its mean
    scale = 1.0 if examples is None else jnp.sqrt(jnp.asarray(examples, step.dtype))
    wide = {name: scale * x.astype(step.dtype) for name, x in tensors.items()}
    gathered = {}  # [N, copies, *block]
    for group in step.groups:
        gathered[group.name] = jax.vmap(lambda one, group=group: gather(group, one))(wide)
    return gathered


def _checked(
    where: str,
    name: str,
    leaves: dict,
    like: jax.Array,
    examples: Numeric | None,
) -> jax.Array:
    """One leaf with an axis of examples, of length one for a mean over them."""
    if name not in leaves:
        raise ValueError(
            f"{where}.update: sampled_grads has no leaf {name!r}; expected a tree like the "
            f"gradient, and found {sorted(leaves)}."
        )
    leaf = leaves[name]
    # a mean over examples is one sample
    if examples is not None and leaf.shape == like.shape:
        return leaf[None]
    # a gradient for every example
    if examples is None and leaf.shape[1:] == like.shape and leaf.ndim:
        return leaf
    expected = f"{like.shape}, the mean over examples={examples}"
    if examples is None:
        expected = f"[N, *{like.shape}], N examples. Give the number in examples= for their mean"
    raise ValueError(
        f"{where}.update: leaf {name!r} of sampled_grads has shape {leaf.shape}; expected {expected}."
    )
