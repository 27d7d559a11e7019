"""Losses on pairs of responses: all measure how far the policy prefers the chosen one to the rejected one.

margin.py            of h = log π/π_ref(chosen) - log π/π_ref(rejected) alone
anchored.py          of each response's own log π/π_ref
lengths.py           with the responses' lengths
adaptive.py          with a strength that follows the data
transport.py         between sorted batches
divergences.py       under divergences other than the reverse KL
reference_free.py    without a reference
"""

from jaxalign.losses.contract import PAIR_INPUTS, Kind
from jaxalign.losses.pairs.adaptive import beta_dpo, wpo, wpo_unaligned
from jaxalign.losses.pairs.anchored import apo_down, apo_zero, bco_pair, dpop, nca_pair, sppo_hard
from jaxalign.losses.pairs.divergences import dpo_alpha, dpo_forward_kl, dpo_js
from jaxalign.losses.pairs.lengths import ld_dpo, rdpo, sigmoid_norm
from jaxalign.losses.pairs.margin import discopop, dpo, exo_pair, hinge, ipo, robust
from jaxalign.losses.pairs.reference_free import cpo, orpo, sft, sft_norm, simpo, slic
from jaxalign.losses.pairs.transport import aot, aot_unpaired

PAIR_LOSSES = {
    "dpo": dpo,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "dpop": dpop,
    "sigmoid_norm": sigmoid_norm,
    "rdpo": rdpo,
    "ld_dpo": ld_dpo,
    "beta_dpo": beta_dpo,
    "wpo": wpo,
    "wpo_unaligned": wpo_unaligned,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "dpo_forward_kl": dpo_forward_kl,
    "dpo_js": dpo_js,
    "dpo_alpha": dpo_alpha,
    "sft": sft,
    "sft_norm": sft_norm,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "slic": slic,
}
PAIR = Kind(PAIR_LOSSES, PAIR_INPUTS, "B", whole_batches=True)
