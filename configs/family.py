"""K-FAC and what a user would take instead: one grid and one budget for all of them.

`:digits`, `:autoencoder` and `:cnn` race every method of the catalogue on three small problems made
of the handwritten digits of scikit-learn, for which no files are needed.
"""

import ml_collections

import kfac_optax as ko

VARIANTS = ("default", "digits", "autoencoder", "cnn")
_OF_OPTAX = ("sgd", "adam", "muon")
_ONLY_CHAINS = ("kfra",)  # whose recursion knows dense layers alone


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Returns the settings of the experiment; `variant` is one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"--config=...:{variant}: got {variant!r}, expected one of {VARIANTS}")
    config = ml_collections.ConfigDict(
        {
            "name": "family",
            "title": "handwritten digits, 64-128-64-10 tanh MLP",
            "data": {"name": "digits", "train": 1_500, "test": 297},
            "model": {"name": "mlp", "widths": (128, 64)},
            "likelihood": "categorical",
            "optimizers": (
                "sgd",
                "adam",
                "muon",
                "shampoo",
                "soap",
                "kfac",
                "ekfac",
                "two_level",
                "kfac_bounded",
                "kfac_adaptive",
            ),
            "seeds": 3,
            "epochs": 15,
            "batch_size": 128,
            "learning_rate": 1e-2,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "kfac": {
                "damping": 1e-2,
                "kl_clip": 1e-3,
                "bound": "damped",  # KL-clip alone, as in the papers
                "curvature_every": 5,
                "inverse_every": 20,
                "inverse": "eigh",
            },
            "adaptive": {},
            "report_every": 0,
            "evaluate_every": 0,
            "budget_seconds": 0.0,
            "tune": True,
            "tune_seeds": 0,
            "grid": (1e-1, 3e-2, 1e-2, 3e-3, 1e-3),
            "targets": (0.2, 0.1, 0.05),
            "workers": 2,
            "out": "",
        }
    )
    return config if variant == "default" else _whole_family(config, variant)


def _whole_family(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """Every method of the catalogue, each with the same grid and as many epochs."""
    config.name = f"family_{variant}"
    config.low_rank = ml_collections.ConfigDict({"rank": 16})
    # a row for each example, not for each of its outputs: of 64 pixels the kernel would be 8192 wide
    config.sample_space = ml_collections.ConfigDict({"sampled": True})
    # of all gradients of a run, which are small: the default is for losses of large models
    config.mfac = ml_collections.ConfigDict({"window": 256, "damping": 1e-2})
    # a prior of weights as large as those at the start; at temperature one this little data says
    # less of 17,000 weights than the prior
    config.posterior = ml_collections.ConfigDict({"temperature": 1e-2, "variance": 1e-2})
    config.grid = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
    config.tune_seeds = 1  # a rate is tried once, then the best gets the other seeds
    chains = () if variant == "cnn" else _ONLY_CHAINS
    config.optimizers = (*_OF_OPTAX, *ko.CATALOGUE, *chains)
    if variant == "autoencoder":
        config.title = "handwritten digits, 64-128-64-16 tanh autoencoder"
        config.data.reconstruct = True
        config.model = ml_collections.ConfigDict({"name": "autoencoder", "widths": (128, 64, 16)})
        config.likelihood = "pixels"
        config.kfac.damping = 1e-1  # of a loss summed over pixels
        config.targets = (22.0, 20.0, 18.0)
    if variant == "cnn":
        config.title = "handwritten digits, small CNN"
        config.data.shape = (8, 8, 1)
        config.model = ml_collections.ConfigDict(
            {"name": "small_cnn", "channels": (8, 16), "hidden": (32,), "kernel": 3, "outputs": 10}
        )
        config.python_loop = True  # convolutions in a compiled loop are slow on a CPU
    return config
