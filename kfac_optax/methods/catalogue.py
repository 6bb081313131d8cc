"""All methods: one record each, collected from the files that define them."""

from kfac_optax.methods.kfac import (
    adaptive,
    ekfac,
    eva,
    fixed,
    foof,
    hylo,
    ingd,
    low_rank_records,
    noisy,
    singd,
    skfac,
    thor,
)
from kfac_optax.methods.record import Method, collect
from kfac_optax.methods.sample_space import smw, spring

CATALOGUE: dict[str, Method] = collect(
    fixed.RECORDS,
    ekfac.RECORDS,
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
)
"""Records of all methods by the name of their preset, see `Method`."""
