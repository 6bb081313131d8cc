"""Public-style models at tiny size, in plain JAX: `(function, parameters, inputs)` by name.

Functions take `(params, *inputs)` and return `[N, ...]`; layers are written the way people write
them, without taps or modules.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

N = 4
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


class Model(NamedTuple):
    """A model, and the parameters that no block can own, by path."""

    function: Any
    params: Any
    inputs: tuple
    uncovered: tuple[str, ...] = ()


def draw(*shape: int) -> np.ndarray:
    """NumPy draws in double precision, whatever JAX is set to while tests are collected."""
    return 0.4 * np.random.default_rng(len(shape) + sum(shape)).normal(size=shape)


def dense(inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {"w": draw(inputs, outputs), "b": draw(outputs)}


def apply(p: Any, x: Any) -> Any:
    return x @ p["w"] + p["b"]


def conv(p: Any, x: Any, strides=(1, 1), padding="SAME", **options: Any) -> Any:
    made = jax.lax.conv_general_dilated(
        x, p["w"], strides, padding, dimension_numbers=CHANNELS_LAST, **options
    )
    return made + p["b"]


def window(height: int, width: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {"w": draw(height, width, inputs, outputs), "b": draw(outputs)}


def layer_norm(p: Any, x: Any) -> Any:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * p["scale"] + p["shift"]


def norm(size: int) -> dict[str, np.ndarray]:
    return {"scale": 1 + draw(size), "shift": draw(size)}


def rms_norm(scale: Any, x: Any) -> Any:
    """As Gemma has it: the parameter is what the scale differs from one by."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + scale)


def attention(p: Any, x: Any, memory: Any = None, bias: Any = 0.0) -> Any:
    memory = x if memory is None else memory
    q = jnp.einsum("ntd,dhk->nthk", x, p["q"])
    k, v = jnp.einsum("nsd,cdhk->cnshk", memory, p["kv"])
    scores = jnp.einsum("nthk,nshk->nhts", q, k) / 2 + bias
    return jnp.einsum("nhts,nshk,hko->nto", jax.nn.softmax(scores), v, p["o"])


def heads(width: int) -> dict[str, np.ndarray]:
    return {"q": draw(width, 2, 2), "kv": draw(2, width, 2, 2), "o": draw(2, 2, width)}


def resnet(p, x):
    """Stem, a block with a projected shortcut, global average."""
    x = jax.nn.relu(conv(p["stem"], x) + 0.3)
    y = jax.nn.silu(layer_norm(p["norm"], conv(p["one"], x, (2, 2))))
    x = conv(p["two"], y) + conv(p["shortcut"], x, (2, 2))
    return apply(p["head"], jax.nn.silu(x).mean((1, 2)))


RESNET = {
    "stem": window(3, 3, 2, 3),
    "one": window(3, 3, 3, 4),
    "norm": norm(4),
    "two": window(3, 3, 4, 4),
    "shortcut": window(1, 1, 3, 4),
    "head": dense(4, 2),
}


def densenet(p, x):
    """Every layer sees the maps of all before it."""
    for name in ("one", "two"):
        x = jnp.concatenate([x, jnp.tanh(conv(p[name], x))], -1)
    return apply(p["head"], x.mean((1, 2)))


DENSENET = {"one": window(3, 3, 2, 2), "two": window(3, 3, 4, 2), "head": dense(6, 2)}


def efficientnet(p, x):
    """An inverted bottleneck with squeeze and excitation."""
    y = jax.nn.silu(conv(p["expand"], x))
    y = jax.nn.silu(conv(p["depthwise"], y, feature_group_count=4))
    gate = jax.nn.silu(apply(p["squeeze"], y.mean((1, 2))))
    y = y * jax.nn.sigmoid(apply(p["excite"], gate))[:, None, None]
    return (x + conv(p["project"], y)).mean((1, 2))


EFFICIENTNET = {
    "expand": window(1, 1, 2, 4),
    "depthwise": window(3, 3, 1, 4),
    "squeeze": dense(4, 2),
    "excite": dense(2, 4),
    "project": window(1, 1, 4, 2),
}


def convnext(p, x):
    """Depthwise convolution, norm, two dense layers, a scale for the branch."""
    y = layer_norm(p["norm"], conv(p["depthwise"], x, feature_group_count=3))
    y = apply(p["down"], jax.nn.gelu(apply(p["up"], y)))
    return (x + y * p["gamma"]).mean((1, 2))


CONVNEXT = {
    "depthwise": window(3, 3, 1, 3),
    "norm": norm(3),
    "up": dense(3, 6),
    "down": dense(6, 3),
    "gamma": draw(3),
}


def unet(p, x):
    """Down, up by a convolution of a dilated map, and a skip."""
    low = jnp.tanh(conv(p["down"], x, (2, 2)))
    high = conv(p["up"], low, padding=((1, 2), (1, 2)), lhs_dilation=(2, 2))
    return conv(p["out"], jnp.concatenate([x, jnp.tanh(high)], -1))


UNET = {"down": window(3, 3, 2, 3), "up": window(3, 3, 3, 2), "out": window(1, 1, 4, 1)}


def vae(p, x, noise):
    """Mean and spread of a code, a draw of it, and what it stands for."""
    hidden = jnp.tanh(apply(p["encoder"], x))
    mean, log_scale = apply(p["mean"], hidden), apply(p["log_scale"], hidden)
    code = mean + jnp.exp(log_scale) * noise
    decoded = apply(p["out"], jnp.tanh(apply(p["decoder"], code)))
    return jnp.concatenate([decoded, mean, log_scale], -1)


VAE = {
    "encoder": dense(4, 3),
    "mean": dense(3, 2),
    "log_scale": dense(3, 2),
    "decoder": dense(2, 3),
    "out": dense(3, 4),
}


def vit(p, x):
    """Patches as tokens, learned positions, one block, mean of the tokens."""
    n, h, w, c = x.shape
    patches = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    y = apply(p["patch"], patches.reshape(n, -1, 4 * c)) + p["positions"]
    y = y + attention(p["heads"], layer_norm(p["norm"], y))
    y = y + apply(p["down"], jax.nn.gelu(apply(p["up"], layer_norm(p["norm2"], y))))
    return apply(p["head"], y.mean(1))


VIT = {
    "patch": dense(8, 3),
    "positions": draw(4, 3),
    "norm": norm(3),
    "heads": heads(3),
    "norm2": norm(3),
    "up": dense(3, 5),
    "down": dense(5, 3),
    "head": dense(3, 2),
}


def whisper(p, frames, tokens):
    """A convolution over time, an encoder, a decoder that reads it, the table as head."""
    axes = ("NWC", "WIO", "NWC")
    x = jax.lax.conv_general_dilated(frames, p["stem"], (2,), "SAME", dimension_numbers=axes)
    memory = jax.nn.gelu(x)
    memory = memory + attention(p["encoder"], layer_norm(p["norm"], memory))
    y = p["table"][tokens] + p["positions"][: tokens.shape[1]]
    y = y + attention(p["self"], y)
    y = y + attention(p["cross"], layer_norm(p["norm2"], y), memory)
    return y @ p["table"].T


WHISPER = {
    "stem": draw(3, 2, 4),
    "norm": norm(4),
    "encoder": heads(4),
    "table": draw(5, 4),
    "positions": draw(6, 4),
    "self": heads(4),
    "norm2": norm(4),
    "cross": heads(4),
}


def t5(p, tokens):
    """Relative positions: a table of biases of the scores, which all examples share."""
    length = tokens.shape[1]
    distance = jnp.abs(jnp.arange(length)[:, None] - jnp.arange(length))
    bias = p["relative"][distance].transpose(2, 0, 1)
    y = p["table"][tokens]
    y = y + attention(p["heads"], rms_norm(p["norm"], y), bias=bias)
    gate = jax.nn.gelu(y @ p["gate"]) * (y @ p["up"])
    return (y + gate @ p["down"]) @ p["head"]


T5 = {
    "relative": draw(3, 2),
    "table": draw(5, 4),
    "norm": draw(4),
    "heads": heads(4),
    "gate": draw(4, 6),
    "up": draw(4, 6),
    "down": draw(6, 4),
    "head": draw(4, 5),
}


def gemma(p, tokens):
    """Scaled embeddings, rotated queries and keys, one pair of them for all heads, a tied head."""
    y = p["table"][tokens] * 2.0
    for layer in p["layers"]:
        h = rms_norm(layer["norm"], y)
        q = _rotated(jnp.einsum("ntd,hdk->nthk", h, layer["q"]))
        k, v = jnp.einsum("ntd,cdk->cntk", h, layer["kv"])
        scores = jnp.einsum("nthk,nsk->nhts", q, _rotated(k[:, :, None])[:, :, 0])
        y = y + jnp.einsum("nhts,nsk,hkd->ntd", jax.nn.softmax(scores), v, layer["o"])
        gate, up = jnp.einsum("ntd,cdf->cntf", rms_norm(layer["norm2"], y), layer["in"])
        y = y + (jax.nn.gelu(gate) * up) @ layer["out"]
    return rms_norm(p["norm"], y) @ p["table"].T


def _rotated(x: Any) -> Any:
    angle = jnp.arange(x.shape[1])[:, None, None] * 0.5
    first, second = jnp.split(x, 2, -1)
    turned = first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first
    return jnp.concatenate(turned, -1)


def _gemma_layer() -> dict[str, np.ndarray]:
    return {
        "norm": draw(4),
        "q": draw(2, 4, 2),
        "kv": draw(2, 4, 2),
        "o": draw(2, 2, 4),
        "norm2": draw(4),
        "in": draw(2, 4, 5),
        "out": draw(5, 4),
    }


GEMMA = {"table": draw(6, 4), "layers": [_gemma_layer(), _gemma_layer()], "norm": draw(4)}


def mamba(p, x):
    """A selective state space over time; its decay is computed from a parameter."""
    inner, gate = jnp.split(x @ p["in"], 2, -1)
    axes = ("NWC", "WIO", "NWC")
    inner = jax.lax.conv_general_dilated(
        inner, p["conv"], (1,), [(2, 0)], dimension_numbers=axes, feature_group_count=4
    )
    inner = jax.nn.silu(inner + p["conv_bias"])
    step = jax.nn.softplus(inner @ p["step"] + p["step_bias"])
    write, read = jnp.split(inner @ p["state"], 2, -1)
    decay = -jnp.exp(p["log_decay"])

    def advance(h, now):
        u, d, b, c = now
        h = jnp.exp(d[..., None] * decay) * h + (d * u)[..., None] * b[:, None]
        return h, jnp.sum(h * c[:, None], -1)

    over_time = jax.tree.map(lambda v: v.swapaxes(0, 1), (inner, step, write, read))
    _, y = jax.lax.scan(advance, jnp.zeros((len(x), 4, 2)), over_time)
    y = y.swapaxes(0, 1) + inner * p["skip"]
    return (y * jax.nn.silu(gate)) @ p["out"]


MAMBA = {
    "in": draw(3, 8),
    "conv": draw(3, 1, 4),
    "conv_bias": draw(4),
    "step": draw(4, 4),
    "step_bias": draw(4),
    "state": draw(4, 4),
    "log_decay": draw(4, 2),
    "skip": draw(4),
    "out": draw(4, 3),
}


def mixture_of_experts(p, x):
    """All experts, weighed by a gate."""
    gate = jax.nn.softmax(x @ p["gate"])
    hidden = jax.nn.silu(jnp.einsum("ntd,edf->ntef", x, p["in"]))
    return jnp.einsum("ntef,efd,nte->ntd", hidden, p["out"], gate)


EXPERTS = {"gate": draw(3, 2), "in": draw(2, 3, 4), "out": draw(2, 4, 3)}


def lora(p, x):
    """Low-rank products beside those of a whole weight."""
    hidden = jnp.tanh(x @ p["w"] + x @ p["down"] @ p["up"] + p["b"])
    return hidden @ p["v"] + 0.5 * ((hidden @ p["down2"]) @ p["up2"])


LORA = {
    "w": draw(4, 5),
    "down": draw(4, 2),
    "up": draw(2, 5),
    "b": draw(5),
    "v": draw(5, 3),
    "down2": draw(5, 2),
    "up2": draw(2, 3),
}


def seq2seq(p, x):
    """An LSTM that reads, and one that writes from where that ended."""

    def cell(p, carry, now):
        h, c = carry
        i, f, g, o = jnp.split(now @ p["x"] + h @ p["h"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = (jnp.zeros((len(x), 3)),) * 2
    carry, states = jax.lax.scan(lambda c, x: cell(p["read"], c, x), start, x.swapaxes(0, 1))
    _, written = jax.lax.scan(lambda c, h: cell(p["write"], c, h), carry, states)
    return written.swapaxes(0, 1) @ p["head"]


def _cell(inputs: int, width: int) -> dict[str, np.ndarray]:
    return {"x": draw(inputs, 4 * width), "h": draw(width, 4 * width), "b": draw(4 * width)}


SEQ2SEQ = {"read": _cell(2, 3), "write": _cell(3, 3), "head": draw(3, 2)}


def graph_net(p, nodes, sources, targets):
    """Messages along the edges of each example's graph, added up at the nodes."""

    def one(nodes, sources, targets):
        pairs = jnp.concatenate([nodes[sources], nodes[targets]], -1)
        messages = jnp.tanh(apply(p["edge"], pairs))
        gathered = jax.ops.segment_sum(messages, targets, len(nodes))
        return apply(p["node"], jnp.concatenate([nodes, gathered], -1))

    return apply(p["head"], jnp.tanh(jax.vmap(one)(nodes, sources, targets)).mean(1))


GRAPH = {"edge": dense(4, 3), "node": dense(5, 3), "head": dense(3, 2)}


def wavenet(p, x):
    """Dilated causal convolutions with gates, and skips to the end."""
    axes, skips = ("NWC", "WIO", "NWC"), 0
    for i, layer in enumerate(p["layers"]):
        reach = 2**i
        made = jax.lax.conv_general_dilated(
            x, layer["w"], (1,), [(reach, 0)], rhs_dilation=(reach,), dimension_numbers=axes
        )
        value, gate = jnp.split(made + layer["b"], 2, -1)
        y = jnp.tanh(value) * jax.nn.sigmoid(gate)
        skips, x = skips + y @ layer["skip"], x + y @ layer["out"]
    return jnp.concatenate([skips, x], -1)


def _wave_layer() -> dict[str, np.ndarray]:
    return {"w": draw(2, 3, 6), "b": draw(6), "skip": draw(3, 2), "out": draw(3, 3)}


WAVENET = {"layers": [_wave_layer(), _wave_layer()]}


def deeponet(p, function, points):
    """Values of a function at sensors, and points where its image is wanted."""
    branch = apply(p["branch2"], jnp.tanh(apply(p["branch"], function)))
    trunk = jnp.tanh(apply(p["trunk2"], jnp.tanh(apply(p["trunk"], points))))
    return jnp.einsum("nk,nmk->nm", branch, trunk) + p["offset"]


DEEPONET = {
    "branch": dense(5, 4),
    "branch2": dense(4, 3),
    "trunk": dense(1, 4),
    "trunk2": dense(4, 3),
    "offset": draw(1),
}


def neural_ode(p, x):
    """Runge and Kutta's method with one field in all steps."""

    def field(x):
        return apply(p["out"], jnp.tanh(apply(p["in"], x)))

    def step(x, _):
        one = field(x)
        two = field(x + 0.1 * one)
        three = field(x + 0.1 * two)
        four = field(x + 0.2 * three)
        return x + 0.2 / 6 * (one + 2 * two + 2 * three + four), None

    return jax.lax.scan(step, x, None, length=3)[0]


ODE = {"in": dense(3, 4), "out": dense(4, 3)}


def mixer(p, x):
    """Dense layers along the tokens and along the channels."""
    y = x + jnp.tanh(apply(p["tokens"], x.swapaxes(1, 2))).swapaxes(1, 2)
    return y + jnp.tanh(apply(p["channels"], layer_norm(p["norm"], y)))


MIXER = {"tokens": dense(3, 3), "channels": dense(4, 4), "norm": norm(4)}


def physics(p, x):
    """Value and Laplacian of a network in its inputs."""

    def u(z):
        return apply(p["last"], jnp.tanh(apply(p["middle"], jnp.tanh(apply(p["first"], z)))))[0]

    return jax.vmap(lambda z: jnp.stack([u(z), jnp.trace(jax.hessian(u)(z))]))(x)


PHYSICS = {"first": dense(2, 4), "middle": dense(4, 4), "last": dense(4, 1)}


def fermi_net(p, r):
    """`log |psi|` of two electrons, one determinant, with envelopes."""
    between = r[:, :, None] - r[:, None]
    length = jnp.sqrt(jnp.sum(between**2, -1) + 0.1).mean(2, keepdims=True)
    away = jnp.sqrt(jnp.sum(r**2, -1, keepdims=True) + 0.1)
    h = jnp.tanh(apply(p["first"], jnp.concatenate([r, away, length], -1)))
    h = h + jnp.tanh(apply(p["second"], jnp.concatenate([h, h.mean(1, keepdims=True) + 0 * h], -1)))
    orbitals = apply(p["orbitals"], h) * jnp.exp(-away * p["decay"]) * p["weight"]
    return jnp.linalg.slogdet(orbitals + 2 * jnp.eye(2))[1][:, None]


FERMI = {
    "first": dense(5, 3),
    "second": dense(6, 3),
    "orbitals": dense(3, 2),
    "decay": 1 + draw(2),
    "weight": 1 + draw(2),
}

IMAGES = draw(N, 4, 4, 2)
TOKENS = np.asarray([[0, 1, 4], [2, 2, 3], [0, 4, 1], [3, 1, 1]])
EDGES = np.asarray([[0, 1, 2], [1, 2, 0], [0, 0, 1], [2, 1, 0]])
MODELS = {
    "resnet": Model(resnet, RESNET, (IMAGES,)),
    "densenet": Model(densenet, DENSENET, (IMAGES,)),
    "efficientnet": Model(efficientnet, EFFICIENTNET, (IMAGES,)),
    "convnext": Model(convnext, CONVNEXT, (draw(N, 4, 4, 3),)),
    "unet": Model(unet, UNET, (IMAGES,)),
    "vae": Model(vae, VAE, (draw(N, 4), draw(N, 2))),
    "vit": Model(vit, VIT, (IMAGES,)),
    "whisper": Model(whisper, WHISPER, (draw(N, 6, 2), TOKENS)),
    "t5": Model(t5, T5, (TOKENS,)),
    "gemma": Model(gemma, GEMMA, (TOKENS,)),
    "mamba": Model(mamba, MAMBA, (draw(N, 5, 3),), ("log_decay",)),
    "mixture of experts": Model(mixture_of_experts, EXPERTS, (draw(N, 2, 3),)),
    "lora": Model(lora, LORA, (draw(N, 4),)),
    "seq2seq": Model(seq2seq, SEQ2SEQ, (draw(N, 3, 2),)),
    "graph net": Model(graph_net, GRAPH, (draw(N, 3, 2), EDGES, EDGES[::-1])),
    "wavenet": Model(wavenet, WAVENET, (draw(N, 6, 3),)),
    "deeponet": Model(deeponet, DEEPONET, (draw(N, 5), draw(N, 3, 1))),
    "neural ode": Model(neural_ode, ODE, (draw(N, 3),)),
    "mixer": Model(mixer, MIXER, (draw(N, 3, 4),)),
    "physics": Model(physics, PHYSICS, (draw(N, 2),)),
    "fermi net": Model(fermi_net, FERMI, (draw(N, 2, 3),)),
}
