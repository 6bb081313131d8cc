"""Shapes of the layers of well-known networks, without embeddings and normalisation."""

from kfac_optax.planner.formulas import Shape


def resnet50() -> list[Shape]:
    """ResNet-50 on 1000 classes: a convolution of `k x k` taps is a matrix `[k^2 inputs, outputs]`.

    >>> shapes = resnet50()
    >>> print(sum(s.copies for s in shapes), sum(s.copies * s.gradient for s in shapes))
    54 25503912
    """
    # of the first layer, 7 x 7 taps of three channels
    counts: dict[tuple[int, int], int] = {(147, 64): 1}

    def add(p: int, q: int) -> None:
        counts[p, q] = counts.get((p, q), 0) + 1

    inputs = 64
    stages = ((64, 3), (128, 4), (256, 6), (512, 3))
    # three convolutions in a block: down, 3 x 3, up again
    for width, blocks in stages:
        add(inputs, 4 * width)  # the shortcut of a stage's first block
        for _ in range(blocks):
            add(inputs, width)
            add(9 * width, width)
            add(width, 4 * width)
            inputs = 4 * width
    # 2048 channels and the bias row
    add(2049, 1000)
    return [Shape(copies, p, q) for (p, q), copies in counts.items()]


def bert_large() -> list[Shape]:
    """BERT-Large: 24 layers of width 1024, four projections and two of the MLP each, with biases.

    >>> print(sum(s.copies * s.gradient for s in bert_large()))
    302211072
    """
    # four projections; into the MLP, and out of it
    return [
        Shape(96, 1025, 1024),
        Shape(24, 1025, 4096),
        Shape(24, 4097, 1024),
    ]


def decoder_1b() -> list[Shape]:
    """A decoder of about 10^9 weights: 16 layers of width 2048, keys and values of width 512, a
    gated MLP of width 8192, without biases.

    >>> print(sum(s.copies * s.gradient for s in decoder_1b()))
    973078528
    """
    return [
        # queries and outputs; keys and values; two of a gated MLP; its output
        Shape(32, 2048, 2048),
        Shape(32, 2048, 512),
        Shape(32, 2048, 8192),
        Shape(16, 8192, 2048),
    ]


MODELS = {"resnet50": resnet50, "bert_large": bert_large, "decoder_1b": decoder_1b}
"""Tables of layers by name."""
