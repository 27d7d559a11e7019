"""Floor 3: the mathematics. One value per element; no mask, no reduction, no model.

Every loss under its name, as in `losses.dpo`, and `select_loss("dpo(beta=0.5)", losses.PAIR)` of the kinds LANGUAGE,
PAIR, UNPAIRED, OUTCOME, STEPS and POLICY. contract.py lists the inputs of each kind.
"""

from jaxalign.losses.language import LANGUAGE, LANGUAGE_LOSSES, cross_entropy, dft
from jaxalign.losses.pairs import PAIR, PAIR_LOSSES
from jaxalign.losses.pairs.adaptive import beta_dpo, wpo, wpo_unaligned
from jaxalign.losses.pairs.anchored import apo_down, apo_zero, bco_pair, dpop, nca_pair, sppo_hard
from jaxalign.losses.pairs.divergences import dpo_alpha, dpo_forward_kl, dpo_js
from jaxalign.losses.pairs.lengths import ld_dpo, rdpo, sigmoid_norm
from jaxalign.losses.pairs.margin import discopop, dpo, exo_pair, hinge, ipo, robust
from jaxalign.losses.pairs.reference_free import cpo, orpo, sft, sft_norm, simpo, slic
from jaxalign.losses.pairs.transport import aot, aot_unpaired
from jaxalign.losses.policy import POLICY, POLICY_LOSSES, cispo, ppo_clip, reinforce
from jaxalign.losses.ranking import (
    OUTCOME,
    OUTCOME_LOSSES,
    RANKING_LOSSES,
    STEP_LOSSES,
    STEPS,
    bradley_terry,
    graded_bradley_terry,
    kwise,
    process,
    process_mse,
    rao_kupper,
    soft_bradley_terry,
)
from jaxalign.losses.sums import mixture, select_loss
from jaxalign.losses.unpaired import UNPAIRED, UNPAIRED_LOSSES, apo_zero_unpaired, bco, kto
