"""Taps for what neither modules nor the traced program show: put around a layer's output, they say
what computed it.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from kfac_optax._types import Staircase
from kfac_optax.capture.front_ends.modules import resolve_padding
from kfac_optax.capture.geometry import Conv, Dense, Lookup, ScaleShift
from kfac_optax.capture.patches import Window
from kfac_optax.capture.tap import active, place
from kfac_optax.linalg.staircase import staircase


def tap_dense(
    s: Float[Array, "*batch q"],
    a: Float[Array, "*batch p"],
    kernel: Float[Array, "p q"],
    bias: Float[Array, " q"] | None = None,
    *,
    mask: Any = None,
    name: str = "",
) -> Float[Array, "*batch q"]:
    """Marks `s = a @ kernel + bias` as a dense layer, where the program does not show it by itself.

    An identity: returns `s`. Outside an estimator it does nothing at all.

    Args:
      s: output of the layer, `[*batch, q]`. Use the returned value in place of it.
      a: input of the layer, `[*batch, p]`.
      kernel: the weight **parameter**, `[p, q]` (pass `weight.T` where it is stored transposed).
      bias: the bias parameter `[q]`, if the layer has one.
      mask: constant ones and zeros `[p, q]`, where `s = a @ (kernel * mask) + bias`. Rows have to be
        nested, as those of an autoregressive network are, see `masked`.
      name: shown in errors.

    Returns:
      `s`.

    Raises:
      ValueError: the shapes do not belong together; a mask whose rows are not nested.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((4, 3)), jnp.ones((3, 2))
    >>> print(tap_dense(x @ w, x, w).shape)
    (4, 2)
    """
    label = f"tap_dense{f' {name!r}' if name else ''}"
    # s [*batch, q] = a [*batch, p] kernel [p, q]
    fits = (*a.shape[-1:], *s.shape[-1:]) == kernel.shape
    if kernel.ndim != 2 or not fits:
        raise ValueError(
            f"{label}: got s {s.shape}, a {a.shape}, kernel {kernel.shape}; expected s [*batch, "
            "q], a [*batch, p] and kernel [p, q]. Pass the kernel so that s = a @ kernel (+ bias)."
        )
    if s.shape[:-1] != a.shape[:-1]:
        raise ValueError(
            f"{label}: leading axes of s {s.shape} and a {a.shape} differ; expected the same rows."
        )
    _check_bias(label, bias, s)
    # outside of tracing a tap is its first argument
    if not active():
        return s
    geometry = Dense(_stairs(label, mask, kernel))
    return place(s, a, kernel, *_given(bias), geometry=geometry, name=name)


def tap_conv(
    s: Float[Array, "*batch q"],
    a: Float[Array, "*batch c"],
    kernel: Float[Array, "*window c q"],
    bias: Float[Array, " q"] | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    groups: int = 1,
    mask: Any = None,
    name: str = "",
) -> Float[Array, "*batch q"]:
    """Marks `s` as the convolution of `a` with `kernel`, plus `bias`; channels come last.

    The geometry is that of `jax.lax.conv_general_dilated` with `("NHWC", "HWIO", "NHWC")` and its
    likes in one and three dimensions. An identity: returns `s`. Outside an estimator it does
    nothing at all.

    Args:
      s: output `[N, *out, q]`. Use the returned value in place of it.
      a: input `[N, *spatial, C]`.
      kernel: the weight **parameter**, `[*window, C / groups, q]` (transposed, where it is stored
        otherwise).
      bias: the bias parameter `[q]`, if the layer has one.
      strides: one number, or one per spatial axis.
      input_dilation: as `strides`.
      kernel_dilation: as `strides`.
      padding: `"SAME"`, `"VALID"` or pairs.
      groups: `feature_group_count`.
      mask: constant ones and zeros of the shape of the kernel, where it is `kernel * mask`; nested as
        for `tap_dense`, `[*window, C]` being the rows. Not in groups.
      name: shown in errors.

    Returns:
      `s`.

    Raises:
      ValueError: the shapes do not belong together.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((2, 5, 3)), jnp.ones((3, 3, 4))
    >>> y = jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    >>> print(tap_conv(y, x, w).shape)
    (2, 5, 4)
    """
    label = f"tap_conv{f' {name!r}' if name else ''}"
    # spatial axes; kernel [*window, C / groups, q]
    n = kernel.ndim - 2
    if (
        n < 1
        or a.ndim < n + 1
        or a.shape[-1] != kernel.shape[-2] * groups
        or s.shape[-1] != kernel.shape[-1]
    ):
        raise ValueError(
            f"{label}: got s {s.shape}, a {a.shape}, kernel {kernel.shape}, groups={groups}; "
            "expected s [N, *out, q], a [N, *spatial, C] and kernel [*window, C / groups, q]."
        )
    per_axis = [_per_axis(label, x, n) for x in (strides, input_dilation, kernel_dilation)]
    steps, dilation, spread = per_axis
    # how far a dilated window reaches
    size = tuple(kernel.shape[:n])
    reach = [(k - 1) * d + 1 for k, d in zip(size, spread, strict=True)]
    spatial = a.shape[-1 - n : -1]
    pads = resolve_padding(spatial, reach, steps, dilation, padding)
    window = Window(size, steps, pads, dilation, spread)
    # [*batch, *out], as the window makes it of a
    expected = (*a.shape[: -1 - n], *window.outputs(a.shape))
    if s.shape[:-1] != expected:
        raise ValueError(
            f"{label}: s is {s.shape}, but this geometry makes {(*expected, kernel.shape[-1])} of "
            f"a {a.shape}; check strides, padding and dilation."
        )
    _check_bias(label, bias, s)
    if not active():
        return s
    if mask is not None and groups != 1:
        raise ValueError(f"{label}: got mask= and groups={groups}; expected groups=1.")
    geometry = Conv(window, groups, mask=_stairs(label, mask, kernel))
    return place(s, a, kernel, *_given(bias), geometry=geometry, name=name)


def tap_scale_shift(
    s: Float[Array, "*batch c"],
    a: Float[Array, "*batch c"],
    scale: Float[Array, " c"] | None,
    shift: Float[Array, " c"] | None = None,
    *,
    name: str = "",
) -> Float[Array, "*batch c"]:
    """Marks `s = a * scale + shift`, the end of a normalisation layer.

    An identity: returns `s`. Outside an estimator it does nothing at all.

    Args:
      s: output `[N, *positions, C]`. Use the returned value in place of it.
      a: what is scaled, of the same shape (not used where there is no scale).
      scale: the scale **parameter** `[C]`, or `None`.
      shift: the shift parameter `[C]`, or `None`.
      name: shown in errors.

    Returns:
      `s`.

    Raises:
      ValueError: the shapes do not belong together, or neither parameter is given.

    >>> import jax.numpy as jnp
    >>> x, scale = jnp.ones((4, 3)), jnp.ones(3)
    >>> print(tap_scale_shift(x * scale, x, scale).shape)
    (4, 3)
    """
    label = f"tap_scale_shift{f' {name!r}' if name else ''}"
    # one of both is enough
    operands = [x for x in (scale, shift) if x is not None]
    fits = all(x.shape == s.shape[-1:] for x in operands)
    if not operands or s.shape != a.shape or not fits:
        raise ValueError(
            f"{label}: got s {s.shape}, a {a.shape}, parameters {[x.shape for x in operands]}; "
            "expected s and a of one shape [*batch, C] and a scale, a shift or both of shape [C]."
        )
    if not active():
        return s
    # a shift alone is the bias of a layer that reads ones
    a = jax.numpy.ones_like(s) if scale is None else a
    return place(s, a, *operands, geometry=ScaleShift(), name=name)


def tap_embedding(
    s: Float[Array, "*batch q"],
    tokens: Int[Array, "*batch"],
    table: Float[Array, "vocabulary q"],
    *,
    name: str = "",
) -> Float[Array, "*batch q"]:
    """Marks `s = table[tokens]` as an embedding.

    An identity: returns `s`. Outside an estimator it does nothing at all. A table that is also the
    head, `logits = h @ table.T`, gets `tap_dense(logits, h, table.T)` there.

    Args:
      s: output `[*batch, q]`. Use the returned value in place of it.
      tokens: integers `[*batch]`.
      table: the **parameter** `[vocabulary, q]`.
      name: shown in errors.

    Returns:
      `s`.

    Raises:
      ValueError: the shapes do not belong together.

    >>> import jax.numpy as jnp
    >>> table, tokens = jnp.ones((5, 3)), jnp.arange(4)
    >>> print(tap_embedding(table[tokens], tokens, table).shape)
    (4, 3)
    """
    label = f"tap_embedding{f' {name!r}' if name else ''}"
    # tokens of any integer type, a row of the table for each
    if (
        table.ndim != 2
        or s.shape != (*tokens.shape, *table.shape[1:])
        or tokens.dtype.kind not in "iu"
    ):
        raise ValueError(
            f"{label}: got s {s.shape}, tokens {tokens.dtype}{list(tokens.shape)}, table "
            f"{table.shape}; expected s [*batch, q], integer tokens [*batch] and a table "
            "[vocabulary, q]."
        )
    if not active():
        return s
    return place(s, tokens, table, geometry=Lookup(table.shape[0]), name=name)


def _stairs(label: str, mask: Any, kernel: Array) -> Staircase | None:
    if mask is None:
        return None
    if getattr(mask, "shape", None) != kernel.shape:
        raise ValueError(
            f"{label}: got a mask of shape {getattr(mask, 'shape', None)}; expected an array of that "
            f"of the kernel, {kernel.shape}."
        )
    with jax.ensure_compile_time_eval():
        return staircase(mask.reshape(-1, kernel.shape[-1]), label)


def _given(bias: Array | None) -> tuple[Array, ...]:
    return () if bias is None else (bias,)


def _check_bias(label: str, bias: Array | None, s: Array) -> None:
    if bias is not None and bias.shape != s.shape[-1:]:
        raise ValueError(
            f"{label}: got bias {bias.shape}; expected {s.shape[-1:]}, one value per output."
        )


def _per_axis(label: str, x: Any, axes: int) -> tuple[int, ...]:
    # one number for all axes, as Flax has it
    out = tuple(x) if isinstance(x, Sequence) else (x,) * axes
    if len(out) != axes:
        raise ValueError(
            f"{label}: got {x!r} for {axes} spatial axes; expected one number, or one per axis."
        )
    return out
