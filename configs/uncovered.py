"""What becomes of parameters without a block:
`--config=configs/uncovered.py:NAME --config.kfac.uncovered=pass`.

NAME is one of deep_linear and resnet (batch norm that gets no block), rms_transformer and lstm
(bare parameters).
"""

import ml_collections

_MODELS = {
    "deep_linear": {"name": "linear_mlp", "depth": 64, "width": 10},
    "resnet": {"name": "resnet", "depth": 8, "width": 8},
    "rms_transformer": {"name": "rms_transformer", "depth": 2, "width": 32, "heads": 4},
    "lstm": {"name": "lstm", "width": 32},
}
_SHAPES = {"resnet": (8, 8, 1), "rms_transformer": (8, 8), "lstm": (8, 8)}
_PLANTED = {
    "name": "planted_linear",
    "train": 5_000,
    "test": 1_000,
    "features": 10,
    "target_dim": 1,
}


def get_config(variant: str = "rms_transformer") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment; `variant` is a key of the models."""
    if variant not in _MODELS:
        raise ValueError(
            f"--config=...:{variant}: got {variant!r}, expected one of {sorted(_MODELS)}"
        )
    linear = variant == "deep_linear"
    digits = {"name": "digits", "train": 1_500, "test": 297, "shape": _SHAPES.get(variant, (64,))}
    config = ml_collections.ConfigDict(
        {
            "name": f"uncovered_{variant}",
            "title": f"{variant}, parameters without a block",
            "data": _PLANTED if linear else digits,
            "model": _MODELS[variant],
            "likelihood": "bernoulli" if linear else "categorical",
            "optimizers": ("adam", "kfac"),
            "seeds": 3,
            "epochs": 10,
            "batch_size": 128,
            "learning_rate": 1e-2,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-2,
                "bound": "damped",  # KL-clip alone, as in the papers
                "curvature_every": 10,
                "inverse_every": 20,
                "inverse": "eigh",
                "uncovered": "graft",
            },
            "adaptive": {},  # options of the optimizers that tune themselves
            "tune": True,
            "grid": (1e-1, 1e-2, 1e-3),
            "targets": (0.5, 0.2),
            "python_loop": variant == "resnet",  # convolutions in a compiled loop are slow on a CPU
            "workers": 2,  # processes, each with one thread; 1 trains and times one run at a time in this process
            "out": "",  # results/<name> when empty
        }
    )
    if variant in ("deep_linear", "resnet"):
        config.kfac.normalization = "pass"  # norm layers get no block, so `uncovered` decides
    return config
