"""What held-out pairs and fresh samples say of a policy beside its accuracy: drift, confidence, length, divergence.

`of_batch` turns the scores of one batch into numbers of each pair, `summarise` turns those of all pairs into the log's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpo import reference as references
from mmpo.modality import DrawKey
from mmpo.pair import Block, Pair
from mmpo.scores import Scores

SIDES = ("chosen", "rejected")
CONFIDENCE = frozenset({"top_mass", "top_entropy"})  # measured wherever a modality provides them
TOLD = ("top_mass", "top_entropy", "top_entropy_renormalised")


def log_ratio(policy: Scores, ref: Scores | None) -> Tensor:
    """log policy - log reference of one branch over its units, (B,) nats; log policy where there is no reference."""
    return torch.where(policy.mask, policy.logp if ref is None else policy.logp - ref.logp, 0.0).sum(-1)


def of_batch(policy: Mapping[str, Scores], ref: Mapping[str, Scores] | None) -> dict[str, Tensor]:
    """By name, (B,) each: `ratio_*` and `length_*` of both sides, NaN where a pair lacks one, and the chosen side's confidence.

    `top_mass` and `top_entropy` are means over the tokens of the chosen answer, of the 10 likeliest tokens' probability
    M = sum p and of E = - sum p log p in nats (arXiv 2410.11677, which does not say whether E is of p / M: that one, which is
    E / M + log M, is `top_entropy_renormalised`).
    """
    out = {}
    for side in SIDES:
        scores, present = policy[side], policy[side].mask.any(-1)
        ratio = log_ratio(scores, ref[side] if ref else None)
        out[f"ratio_{side}"] = torch.where(present, ratio.float(), torch.nan)
        out[f"length_{side}"] = torch.where(present, scores.mask.sum(-1).float(), torch.nan)
    mask, extras = policy["chosen"].mask, policy["chosen"].extras
    if extras.keys() >= CONFIDENCE:
        mass, entropy = extras["top_mass"], extras["top_entropy"]
        renormalised = entropy / mass + mass.log()
        for name, values in zip(TOLD, (mass, entropy, renormalised), strict=True):
            out[name] = torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)  # 0 / 0 where there is no chosen side
    return out


def summarise(rows: Mapping[str, Tensor], has_reference: bool) -> dict[str, Any]:
    """The measures of all pairs as numbers. rows: what `of_batch` gives, (draws, n) each.

    drift: how far each side fell below the reference in nats, with the standard error of the chosen side's mean. fell: the
    share of pairs whose chosen answer is less likely than under the reference, and of those whose two answers both are.
    length_correlation: Pearson's, over pairs, of the implicit reward's margin with the difference of lengths.
    """
    mean = {name: values.mean(0).cpu() for name, values in rows.items()}
    out: dict[str, Any] = {"drift": {}, "fell": {}}
    if has_reference:
        out["drift"] = drift(mean)
        chosen, rejected = (mean[f"ratio_{side}"] for side in SIDES)
        whole = ~(chosen.isnan() | rejected.isnan())
        if whole.any():
            out["fell"] = {
                "chosen": float((chosen[whole] < 0).double().mean()),
                "both": float(((chosen < 0) & (rejected < 0))[whole].double().mean()),
            }
    margin, longer = (mean[f"{name}_chosen"] - mean[f"{name}_rejected"] for name in ("ratio", "length"))
    out["length_correlation"] = correlation(margin, longer)
    out |= {name: float(mean[name].nanmean()) for name in TOLD if name in mean}
    return out


def drift(mean: Mapping[str, Tensor]) -> dict[str, float]:
    """Minus the mean log-ratio of each side, and the standard error of the chosen side's."""
    sides = {side: -mean[f"ratio_{side}"][~mean[f"ratio_{side}"].isnan()] for side in SIDES}
    out = {side: float(values.mean()) for side, values in sides.items() if len(values)}
    if len(sides["chosen"]) > 1:
        out["chosen_error"] = float(sides["chosen"].std() / len(sides["chosen"]) ** 0.5)
    return out


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation over the rows where both are numbers; None where one of them does not vary."""
    both = ~(x.isnan() | y.isnan())
    a, b = x[both].double(), y[both].double()
    if len(a) < 3 or not float(a.std()) or not float(b.std()):
        return None
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@torch.no_grad()
def against_reference(
    modality: Any,
    model: nn.Module,
    reference: Any,
    prompts: Sequence[tuple[Block, ...]],
    blocks: Sequence[Block],
    batch: int = 64,
) -> dict[str, np.ndarray]:
    """What a policy thinks of answers, compared with its reference, (n,) float64 each, in nats.

    log_ratio: log policy - log reference. kl: KL(policy || reference) of the next token, summed over the tokens of the
    answer; over answers that the policy itself sampled, its mean estimates the divergence of whole answers. An answer cut at
    the longest length is scored as if it had ended there. Empty without a reference, and for modalities whose likelihood is
    a surrogate.
    """
    if reference is None or "kl_policy" not in modality.PROVIDES:
        return {}
    inner = reference.inner if isinstance(reference, references.Cached) else reference
    found: dict[str, list[Tensor]] = {"log_ratio": [], "kl": []}
    for start in range(0, len(blocks), batch):
        part = range(start, min(start + batch, len(blocks)))
        pairs = [Pair(f"sample/{i}", prompts[i], (blocks[i],)) for i in part]
        drawn = modality.draw(modality.encode(pairs), [DrawKey(0, p.id, 0) for p in pairs], model)
        ref = references.score(inner, modality, model, drawn, frozenset({"states"}))
        scores = modality.score(model, drawn, frozenset({"kl_policy"}), ref)["chosen"]
        found["log_ratio"].append(log_ratio(scores, ref["chosen"] if ref else None))
        found["kl"].append(torch.where(scores.mask, scores.extras["kl_policy"], 0.0).sum(-1))
    return {name: torch.cat(parts).double().cpu().numpy() for name, parts in found.items() if parts}
