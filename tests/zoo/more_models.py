"""More models of public kinds in plain JAX, parameters kept as other libraries keep them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.zoo.models import (
    IMAGES,
    TOKENS,
    Model,
    N,
    apply,
    attention,
    conv,
    dense,
    draw,
    heads,
    layer_norm,
    norm,
    rms_norm,
    window,
)


def masked_autoencoder(p, images):
    """Half of the patches are read, a token stands for the others, all are drawn."""
    n, h, w, c = images.shape
    patches = images.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    tokens = apply(p["patch"], patches.reshape(n, -1, 4 * c)) + p["positions"]
    seen = tokens[:, :2]
    seen = seen + attention(p["encoder"], layer_norm(p["norm"], seen))
    unseen = jnp.zeros((n, 2, 3)) + p["mask"]
    whole = jnp.concatenate([seen, unseen], 1) + p["places"]
    return apply(p["pixels"], whole + attention(p["decoder"], whole))


MAE = {
    "patch": dense(8, 3),
    "positions": draw(4, 3),
    "norm": norm(3),
    "encoder": heads(3),
    "mask": draw(3),
    "places": draw(4, 3),
    "decoder": heads(3),
    "pixels": dense(3, 8),
}


def qwen(p, tokens):
    """Layers kept in one stack and run one by one; queries share keys; the head is a table."""
    y = p["table"][tokens]
    for i in range(2):
        layer = jax.tree.map(lambda x, i=i: x[i], p["layers"])
        h = rms_norm(layer["norm"], y)
        q, k, v = (h @ layer[name] + layer["b" + name] for name in ("wq", "wk", "wv"))
        q = q.reshape(*q.shape[:2], 2, 2)
        weights = jax.nn.softmax(jnp.einsum("nthk,nsk->nhts", q, k))
        mixed = jnp.einsum("nhts,nsk->nthk", weights, v).reshape(y.shape)
        y = y + mixed @ layer["wo"]
        h = rms_norm(layer["norm2"], y)
        y = y + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return rms_norm(p["norm"], y) @ p["table"].T


QWEN = {
    "table": draw(5, 4),
    "norm": draw(4),
    "layers": {
        "norm": draw(2, 4),
        "wq": draw(2, 4, 4),
        "bwq": draw(2, 4),
        "wk": draw(2, 4, 2),
        "bwk": draw(2, 2),
        "wv": draw(2, 4, 2),
        "bwv": draw(2, 2),
        "wo": draw(2, 4, 4),
        "norm2": draw(2, 4),
        "gate": draw(2, 4, 5),
        "up": draw(2, 4, 5),
        "down": draw(2, 5, 4),
    },
}


def merged_adapters(p, x):
    """One weight for queries, keys and values, cut before it is used; adapters in the weights."""
    kernel = jnp.split(p["qkv"], 3, 1)
    q, k, v = (x @ (w + 2.0 * (a["down"] @ a["up"])) for w, a in zip(kernel, p["low"]))
    y = x + jnp.einsum("nts,nsd->ntd", jax.nn.softmax(jnp.einsum("ntd,nsd->nts", q, k)), v)
    return y @ (p["out"] / np.sqrt(3)) + p["b"]


ADAPTERS = {
    "qkv": draw(3, 9),
    "low": [{"down": draw(3, 1) + i, "up": draw(1, 3) - i} for i in range(3)],
    "out": draw(3, 2),
    "b": draw(2),
}


def gpt(p, tokens):
    """As it was published: one product for queries, keys and values, norms with shift, GELU."""
    y = p["wte"][tokens] + p["wpe"][: tokens.shape[1]]
    for layer in p["h"]:
        q, k, v = jnp.split(apply(layer["attn"], layer_norm(layer["ln_1"], y)), 3, -1)
        weights = jax.nn.softmax(jnp.einsum("ntd,nsd->nts", q, k) / 2)
        y = y + apply(layer["proj"], jnp.einsum("nts,nsd->ntd", weights, v))
        hidden = jax.nn.gelu(apply(layer["fc"], layer_norm(layer["ln_2"], y)))
        y = y + apply(layer["out"], hidden)
    return layer_norm(p["ln_f"], y) @ p["wte"].T


def _gpt_layer() -> dict[str, Any]:
    return {
        "ln_1": norm(4),
        "attn": dense(4, 12),
        "proj": dense(4, 4),
        "ln_2": norm(4),
        "fc": dense(4, 6),
        "out": dense(6, 4),
    }


GPT = {"wte": draw(5, 4), "wpe": draw(6, 4), "h": [_gpt_layer()], "ln_f": norm(4)}


def haiku_network(p, images):
    """Parameters by the names of modules, as Haiku keeps them."""

    def linear(name, x):
        return jnp.dot(x, p[name]["w"]) + p[name]["b"]

    made = jax.lax.conv_general_dilated(
        images, p["net/~/conv2_d"]["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jnp.tanh(made + p["net/~/conv2_d"]["b"]).reshape(len(images), -1)
    y = jnp.tanh(linear("net/~/mlp/~/linear_0", y))
    scale, offset = p["net/~/layer_norm"]["scale"], p["net/~/layer_norm"]["offset"]
    centred = y - y.mean(-1, keepdims=True)
    y = scale * centred * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5) + offset
    return linear("net/~/mlp/~/linear_1", y)


HAIKU = {
    "net/~/conv2_d": window(3, 3, 2, 3),
    "net/~/mlp/~/linear_0": dense(12, 4),
    "net/~/layer_norm": {"scale": 1 + draw(4), "offset": draw(4)},
    "net/~/mlp/~/linear_1": dense(4, 2),
}


def haiku_lstm(p, x):
    """One product for input and state, all four gates side by side."""
    layer = p["lstm/linear"]

    def cell(carry, now):
        h, c = carry
        gates = jnp.concatenate([now, h], -1) @ layer["w"] + layer["b"]
        i, g, f, o = jnp.split(gates, 4, -1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    _, states = jax.lax.scan(cell, (jnp.zeros((len(x), 3)),) * 2, x.swapaxes(0, 1))
    return jnp.dot(states.swapaxes(0, 1), p["linear"]["w"]) + p["linear"]["b"]


HAIKU_LSTM = {"lstm/linear": dense(5, 12), "linear": dense(3, 2)}


def ppo(p, observations):
    """Mean and spread of a policy, which has a spread of its own, and a value."""
    mean = apply(p["pi"][1], jnp.tanh(apply(p["pi"][0], observations)))
    spread = jnp.zeros_like(mean) + p["log_std"]
    value = apply(p["v"][1], jnp.tanh(apply(p["v"][0], observations)))
    return jnp.concatenate([mean, jnp.exp(spread), value], -1)


PPO = {
    "pi": [dense(3, 4), dense(4, 2)],
    "log_std": draw(2),
    "v": [dense(3, 4), dense(4, 1)],
}


def siren(p, x):
    """Sines of scaled weights, and the slope of the field in its inputs."""

    def field(z):
        for layer in p[:-1]:
            z = jnp.sin(3.0 * (z @ layer["w"] + layer["b"]))
        return apply(p[-1], z)[0]

    return jax.vmap(lambda z: jnp.append(jax.grad(field)(z), field(z)))(x)


SIREN = [dense(2, 3), dense(3, 3), dense(3, 1)]


def flow(p, x):
    """Two couplings of RealNVP: what comes out, and the logarithm of its volume."""
    volume = 0.0
    for layer in p:
        kept, changed = jnp.split(x, 2, -1)
        hidden = jnp.tanh(apply(layer["in"], kept))
        scale = jnp.tanh(apply(layer["scale"], hidden))
        changed = changed * jnp.exp(scale) + apply(layer["shift"], hidden)
        x, volume = jnp.concatenate([changed, kept], -1), volume + scale.sum(-1, keepdims=True)
    return jnp.concatenate([x, volume], -1)


FLOW = [{"in": dense(2, 3), "scale": dense(3, 2), "shift": dense(3, 2)} for _ in range(2)]


def diffusion(p, images, time):
    """Features of the time scale and shift the maps of a small U-Net."""
    angles = time[:, None] * jnp.asarray([1.0, 2.0])
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    embedded = jax.nn.silu(apply(p["time"], features))
    scale, shift = jnp.split(apply(p["film"], embedded), 2, -1)
    y = layer_norm(p["norm"], conv(p["in"], images))
    y = jax.nn.silu(y * (1 + scale[:, None, None]) + shift[:, None, None])
    low = jax.nn.silu(conv(p["down"], y, (2, 2)))
    high = jax.image.resize(low, (N, 4, 4, 3), "nearest")
    return conv(p["out"], jnp.concatenate([y, high], -1))


DIFFUSION = {
    "time": dense(4, 3),
    "film": dense(3, 6),
    "in": window(3, 3, 2, 3),
    "norm": norm(3),
    "down": window(3, 3, 3, 3),
    "out": window(1, 1, 6, 2),
}

MODELS = {
    "masked autoencoder": Model(masked_autoencoder, MAE, (IMAGES,)),
    "qwen": Model(qwen, QWEN, (TOKENS,)),
    "merged adapters": Model(merged_adapters, ADAPTERS, (draw(N, 3, 3),)),
    "gpt": Model(gpt, GPT, (TOKENS,)),
    "haiku network": Model(haiku_network, HAIKU, (IMAGES,)),
    "haiku lstm": Model(haiku_lstm, HAIKU_LSTM, (draw(N, 3, 2),)),
    "ppo": Model(ppo, PPO, (draw(N, 3),)),
    "siren": Model(siren, SIREN, (draw(N, 2),)),
    "flow": Model(flow, FLOW, (draw(N, 4),)),
    "diffusion": Model(diffusion, DIFFUSION, (IMAGES, np.linspace(0.1, 0.9, N))),
}
