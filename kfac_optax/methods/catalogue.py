"""All methods: one record each, collected from the files that define them."""

from kfac_optax.methods.gradient import (
    adahessian,
    distributed,
    esgd,
    ggt,
    jorge_preset,
    mfac,
    presets,
    psgd_record,
    sketchy_preset,
    tnt_preset,
    tonga,
    vadam,
    vogn,
)
from kfac_optax.methods.kfac import (
    adaptive,
    ekfac,
    eva,
    fixed,
    foof,
    hylo,
    ingd,
    k_bfgs_presets,
    kflr,
    kpsvd,
    linear_natural,
    low_rank_records,
    mkor,
    mkor_hybrid,
    noisy,
    singd,
    skfac,
    tekfac,
    thor,
    tkfac,
    two_level,
    two_level_adaptive,
    unitwise,
)
from kfac_optax.methods.record import Method, collect
from kfac_optax.methods.sample_space import smw, spring

CATALOGUE: dict[str, Method] = collect(
    # K-FAC itself and what keeps its blocks
    fixed.RECORDS,
    two_level.RECORDS,
    ekfac.RECORDS,
    tkfac.RECORDS,
    tekfac.RECORDS,
    kpsvd.RECORDS,
    adaptive.RECORDS,
    two_level_adaptive.RECORDS,
    low_rank_records.RECORDS,
    # one side, or one vector, of each layer
    foof.RECORDS,
    eva.RECORDS,
    # all layers together, through rows of the batch
    smw.RECORDS,
    spring.RECORDS,
    # every layer's own refresh, roots without inverses, rows in place of factors
    thor.RECORDS,
    ingd.RECORDS,
    singd.RECORDS,
    skfac.RECORDS,
    hylo.RECORDS,
    # posteriors, rank-one updates, exact outputs, single units, linear nets, quasi-Newton
    noisy.RECORDS,
    mkor.RECORDS,
    mkor_hybrid.RECORDS,
    kflr.RECORDS,
    unitwise.RECORDS,
    linear_natural.RECORDS,
    k_bfgs_presets.RECORDS,
    # from gradients alone
    presets.RECORDS,
    distributed.RECORDS,
    sketchy_preset.RECORDS,
    jorge_preset.RECORDS,
    tnt_preset.RECORDS,
    ggt.RECORDS,
    mfac.RECORDS,
    tonga.RECORDS,
    psgd_record.RECORDS,
    adahessian.RECORDS,
    esgd.RECORDS,
    vadam.RECORDS,
    vogn.RECORDS,
)
"""Records of all methods by the name of their preset, see `Method`."""
