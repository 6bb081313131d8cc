"""All methods: one record each, collected from the files that define them."""

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
    unitwise,
)
from kfac_optax.methods.record import Method, collect
from kfac_optax.methods.sample_space import smw, spring

CATALOGUE: dict[str, Method] = collect(
    fixed.RECORDS,
    ekfac.RECORDS,
    tkfac.RECORDS,
    tekfac.RECORDS,
    kpsvd.RECORDS,
    adaptive.RECORDS,
    low_rank_records.RECORDS,
    foof.RECORDS,
    eva.RECORDS,
    smw.RECORDS,
    spring.RECORDS,
    thor.RECORDS,
    ingd.RECORDS,
    singd.RECORDS,
    skfac.RECORDS,
    hylo.RECORDS,
    noisy.RECORDS,
    mkor.RECORDS,
    mkor_hybrid.RECORDS,
    kflr.RECORDS,
    unitwise.RECORDS,
    linear_natural.RECORDS,
    k_bfgs_presets.RECORDS,
)
"""Records of all methods by the name of their preset, see `Method`."""
