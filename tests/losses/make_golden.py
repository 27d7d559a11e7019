"""Writes tests/losses/golden.json: every loss and its derivatives, in float64 numpy from the papers' formulas.

    python tests/losses/make_golden.py        # needs numpy only; imports nothing of jaxalign

One entry per loss, named as on the command line: its values, and the derivative of their sum by every input that the
policy determines, as a central difference. Factors that the papers do not differentiate (WPO's weight) are computed
from `fixed`, the inputs before they were moved.
"""

import json
from pathlib import Path

import numpy as np

B = 6
draw = np.random.default_rng(0)
lengths = {"chosen_lengths": draw.integers(3, 20, B), "rejected_lengths": draw.integers(3, 20, B)}
inputs = {name: values.astype(float) for name, values in lengths.items()}
for side in ("chosen", "rejected"):
    n = lengths[f"{side}_lengths"]
    inputs[f"ref_{side}_logps"] = -n * draw.uniform(0.3, 2.5, B)
    inputs[f"policy_{side}_logps"] = inputs[f"ref_{side}_logps"] + draw.normal(0, 1.5, B)
    inputs[f"policy_{side}_collision_logps"] = -n * draw.uniform(0.3, 1.0, B)
    for model in ("policy", "ref"):
        inputs[f"{model}_{side}_public_logps"] = inputs[f"{model}_{side}_logps"] * draw.uniform(0.5, 1.0, B)
inputs |= {"mean_chosen_length": 9.5, "running_log_ratio": 0.4, "mean_margin": 1.3, "running_margin": 0.6}
inputs |= {"policy_logps": draw.uniform(-30, -5, B), "ref_logps": draw.uniform(-30, -5, B)}
inputs |= {"labels": np.array([True, False, True, True, False, False]), "kl": 0.7}
inputs |= {"running_desirable_log_ratio": 0.9, "running_undesirable_log_ratio": -0.2}
inputs |= {"chosen_scores": draw.normal(0, 2, B), "rejected_scores": draw.normal(0, 2, B)}
inputs |= {"margins": draw.uniform(0, 3, B), "preferences": draw.uniform(0, 1, B), "ties": draw.random(B) < 0.5}
inputs |= {
    "scores": draw.normal(0, 2, (B, 4)),
    "ranks": draw.integers(0, 3, (B, 4)),
    "candidates": draw.random((B, 4)) < 0.8,
}
inputs |= {"step_scores": draw.normal(0, 2, (B, 3)), "step_labels": draw.integers(0, 2, (B, 3)).astype(float)}
TRAINED = ("policy_", "chosen_scores", "rejected_scores", "scores", "step_scores")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def u(x, side):
    """The probability ratio π/π_ref."""
    return np.exp(x[f"policy_{side}_logps"]) / np.exp(x[f"ref_{side}_logps"])


def w(x):
    return np.log(u(x, "chosen"))


def l(x):  # noqa: E743
    return np.log(u(x, "rejected"))


def smoothed(margin, eps):
    return -(1 - eps) * np.log(sigmoid(margin)) - eps * np.log(1 - sigmoid(margin))


def per_token(x, side):
    return x[f"policy_{side}_logps"] / x[f"{side}_lengths"]


def exo(x, beta, eps):
    p = np.stack([u(x, "chosen") ** beta, u(x, "rejected") ** beta])
    p /= p.sum(0)
    return p[0] * np.log(p[0] / (1 - eps)) + p[1] * np.log(p[1] / eps)


def discopop(x, beta, tau):
    m = beta * (w(x) - l(x))
    return np.log(1 + np.exp(-m)) / (1 + np.exp(m / tau)) + np.exp(-m) / (1 + np.exp(-m / tau))


def ld(x, beta, alpha):
    def hat(model, side):
        public = x[f"{model}_{side}_public_logps"]
        return public + alpha * (x[f"{model}_{side}_logps"] - public)

    h = hat("policy", "chosen") - hat("ref", "chosen") - hat("policy", "rejected") + hat("ref", "rejected")
    return -np.log(sigmoid(beta * h))


def wpo_weight(x, side, aligned):
    collision = x[f"policy_{side}_collision_logps"] if aligned else 0
    return np.exp((x[f"policy_{side}_logps"] - collision) / x[f"{side}_lengths"])


def wpo(x, fixed, aligned):
    weight = wpo_weight(fixed, "chosen", aligned) * wpo_weight(fixed, "rejected", aligned)
    return -weight * np.log(sigmoid(0.1 * (w(x) - l(x))))


def aot(x, beta):
    policy = np.sort(x["policy_chosen_logps"] - x["policy_rejected_logps"])
    ref = np.sort(x["ref_chosen_logps"] - x["ref_rejected_logps"])
    return -np.log(sigmoid(beta * (policy - ref)))


def orpo(x, lam):
    p, q = np.exp(per_token(x, "chosen")), np.exp(per_token(x, "rejected"))
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    return -np.log(p) - lam * np.log(sigmoid(np.log(odds_ratio)))


def kto(x, z0, beta, d, un):
    r = x["policy_logps"] - x["ref_logps"]
    value = np.where(x["labels"], d * sigmoid(beta * (r - z0)), un * sigmoid(beta * (z0 - r)))
    return np.where(x["labels"], d, un) - value


def bco(x, beta):
    delta = beta * (x["running_desirable_log_ratio"] + x["running_undesirable_log_ratio"]) / 2
    r = beta * (x["policy_logps"] - x["ref_logps"])
    return -np.log(sigmoid(np.where(x["labels"], r - delta, -(r - delta))))


def rao_kupper(x, theta):
    a, b = np.exp(x["chosen_scores"]), np.exp(x["rejected_scores"])
    tie = (theta**2 - 1) * a * b / ((a + theta * b) * (theta * a + b))
    return -np.log(np.where(x["ties"], tie, a / (a + theta * b)))


def kwise(x):
    out = []
    for scores, ranks, present in zip(x["scores"], x["ranks"], x["candidates"], strict=True):
        pairs = [
            -np.log(sigmoid(scores[i] - scores[j]))
            for i in range(len(scores))
            for j in range(len(scores))
            if present[i] and present[j] and ranks[i] < ranks[j]
        ]
        out.append(np.mean(pairs) if pairs else 0.0)
    return np.array(out)


def d(x):
    return x["chosen_scores"] - x["rejected_scores"]


def cross_entropy(x):
    p, y = sigmoid(x["step_scores"]), x["step_labels"]
    return -y * np.log(p) - (1 - y) * np.log(1 - p)


LOSSES = {
    "dpo(beta=0.3)": lambda x, _: smoothed(0.3 * (w(x) - l(x)), 0),
    "dpo(beta=0.3, label_smoothing=0.2)": lambda x, _: smoothed(0.3 * (w(x) - l(x)), 0.2),
    "robust(label_smoothing=0.2)": lambda x, _: (
        (0.8 * smoothed(0.1 * (w(x) - l(x)), 0) - 0.2 * smoothed(0.1 * (l(x) - w(x)), 0)) / 0.6
    ),
    "ipo(beta=0.2)": lambda x, _: (w(x) / x["chosen_lengths"] - l(x) / x["rejected_lengths"] - 2.5) ** 2,
    "ipo(beta=0.2, average=False)": lambda x, _: (w(x) - l(x) - 2.5) ** 2,
    "hinge(beta=0.4)": lambda x, _: np.maximum(0, 1 - 0.4 * (w(x) - l(x))),
    "exo_pair(beta=0.5)": lambda x, _: exo(x, 0.5, 1e-3),
    "discopop": lambda x, _: discopop(x, 0.05, 0.05),
    "nca_pair(beta=0.2)": lambda x, _: (
        -np.log(sigmoid(0.2 * w(x))) - 0.5 * np.log(sigmoid(-0.2 * w(x))) - 0.5 * np.log(sigmoid(-0.2 * l(x)))
    ),
    "bco_pair(beta=0.2)": lambda x, _: -np.log(sigmoid(0.2 * (w(x) - 0.4))) - np.log(sigmoid(-0.2 * (l(x) - 0.4))),
    "sppo_hard(beta=0.5)": lambda x, _: (w(x) - 1.0) ** 2 + (l(x) + 1.0) ** 2,
    "apo_zero(beta=0.2)": lambda x, _: -sigmoid(0.2 * w(x)) + sigmoid(0.2 * l(x)),
    "apo_down(beta=0.2)": lambda x, _: sigmoid(0.2 * w(x)) - sigmoid(0.2 * (w(x) - l(x))),
    "dpop(beta=0.1, penalty_coef=5.0)": lambda x, _: (
        -np.log(sigmoid(0.1 * (w(x) - l(x) - 5 * np.maximum(0, np.log(1 / u(x, "chosen"))))))
    ),
    "sigmoid_norm(beta=5.0)": lambda x, _: (
        -np.log(sigmoid(5 * (w(x) / x["chosen_lengths"] - l(x) / x["rejected_lengths"])))
    ),
    "rdpo(alpha=0.05)": lambda x, _: (
        -np.log(sigmoid(0.1 * (w(x) - l(x)) + 0.05 * (x["chosen_lengths"] - x["rejected_lengths"])))
    ),
    "ld_dpo(alpha=0.3)": lambda x, _: ld(x, 0.1, 0.3),
    "beta_dpo(beta=0.2)": lambda x, _: -np.log(sigmoid((1 + 0.6 * (0.2 * 1.3 - 0.2 * 0.6)) * 0.2 * (w(x) - l(x)))),
    "wpo": lambda x, fixed: wpo(x, fixed, True),
    "wpo_unaligned": lambda x, fixed: wpo(x, fixed, False),
    "aot(beta=0.2)": lambda x, _: aot(x, 0.2),
    "aot_unpaired(beta=0.2)": lambda x, _: -np.log(sigmoid(0.2 * (np.sort(w(x)) - np.sort(l(x))))),
    "dpo_forward_kl": lambda x, _: -np.log(sigmoid(0.1 * (1 / u(x, "rejected") - 1 / u(x, "chosen")))),
    "dpo_js": lambda x, _: (
        -np.log(
            sigmoid(
                0.1
                * (
                    np.log(2 * u(x, "chosen") / (1 + u(x, "chosen")))
                    - np.log(2 * u(x, "rejected") / (1 + u(x, "rejected")))
                )
            )
        )
    ),
    "dpo_alpha(alpha=0.7)": lambda x, _: (
        -np.log(sigmoid(0.1 * ((1 - u(x, "chosen") ** -0.7) / 0.7 - (1 - u(x, "rejected") ** -0.7) / 0.7)))
    ),
    "sft": lambda x, _: -x["policy_chosen_logps"] / 9.5,
    "sft_norm": lambda x, _: -per_token(x, "chosen"),
    "simpo(beta=2.5, gamma=1.4)": lambda x, _: (
        -np.log(sigmoid(2.5 * per_token(x, "chosen") - 2.5 * per_token(x, "rejected") - 1.4))
    ),
    "orpo(odds_coef=0.25)": lambda x, _: orpo(x, 0.25),
    "cpo(beta=0.2)": lambda x, _: (
        -np.log(sigmoid(0.2 * (x["policy_chosen_logps"] - x["policy_rejected_logps"]))) - x["policy_chosen_logps"]
    ),
    "slic(delta=2.0)": lambda x, _: np.maximum(0, 2 - x["policy_chosen_logps"] + x["policy_rejected_logps"]),
    "dpo(beta=0.1) + 0.2*sft": lambda x, _: smoothed(0.1 * (w(x) - l(x)), 0) + 0.2 * -x["policy_chosen_logps"] / 9.5,
    "kto(lambda_d=1.5, lambda_u=0.8)": lambda x, _: kto(x, 0.7, 0.1, 1.5, 0.8),
    "apo_zero_unpaired(beta=0.2)": lambda x, _: kto(x, 0, 0.2, 1, 1),
    "bco(beta=0.2)": lambda x, _: bco(x, 0.2),
    "bradley_terry(margin=0.5, centering_coef=0.01)": lambda x, _: (
        -np.log(sigmoid(d(x) - 0.5)) + 0.01 * (x["chosen_scores"] + x["rejected_scores"]) ** 2
    ),
    "bradley_terry(label_smoothing=0.1)": lambda x, _: smoothed(d(x), 0.1),
    "graded_bradley_terry": lambda x, _: -np.log(sigmoid(d(x) - x["margins"])),
    "soft_bradley_terry": lambda x, _: smoothed(d(x), 1 - x["preferences"]),
    "rao_kupper(theta=2.0)": lambda x, _: rao_kupper(x, 2.0),
    "kwise": lambda x, _: kwise(x),
    "process": lambda x, _: cross_entropy(x),
    "process_mse": lambda x, _: (sigmoid(x["step_scores"]) - x["step_labels"]) ** 2,
}


def derivative(loss, name, step=1e-6):
    """Derivatives of the sum of the loss by the elements of one input."""
    slope = np.zeros_like(inputs[name])
    for i in np.ndindex(slope.shape):
        sides = []
        for sign in (1, -1):
            moved = inputs[name].copy()
            moved[i] += sign * step
            sides.append(np.sum(loss(inputs | {name: moved}, inputs)))
        slope[i] = (sides[0] - sides[1]) / (2 * step)
    return slope


def rounded(x, digits):
    return np.vectorize(lambda v: float(f"{v:.{digits}g}"))(x).tolist()


def main():
    trained = [n for n in inputs if n.startswith(TRAINED) and not n.endswith("collision_logps")]
    out = {"inputs": {n: np.asarray(v).tolist() for n, v in inputs.items()}, "losses": {}}
    for text, loss in LOSSES.items():
        slopes = {n: derivative(loss, n) for n in trained}
        slopes = {n: rounded(s, 7) for n, s in slopes.items() if np.any(s)}
        out["losses"][text] = {"values": rounded(loss(inputs, inputs), 9), "gradients": slopes}
    (Path(__file__).parent / "golden.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
