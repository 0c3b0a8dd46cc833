"""What is kept of a reference's scores on disk, from little to everything: `reference.cache` in a recipe.

    sums      one number per branch. Enough for every loss that reads sums or means over all units (most).
    tokens    one number per unit. Enough for LD-DPO and for span weights as well, under any later choice of them.
    states    tokens, and the hidden state that predicts each unit: exact divergences from the reference (TDPO) for the cost
              of its head alone. Kept in the precision they were computed in, so what is replayed is exact; with
              `model.dtype: bf16` they take half.

For a model of hidden size D, an answer of U units takes 12, 5 U and (5 + 4 D) U bytes, and a pair about 0.5 KB more for names,
digest and index: with U = 300 and D = 3584, 1.5 KB and 4.3 MB an answer (2.2 MB in bf16).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmpo.objective import DIVERGENCES, Objective
from mmpo.scores import Scores, States

if TYPE_CHECKING:
    from mmpo.kernels.token_stats import Head

TIERS = ("sums", "tokens", "states")


def check(tier: str | None, objective: Objective, provides: frozenset[str]) -> None:
    """Raise ValueError when an objective reads more of the reference than the tier keeps, or the modality can give.

    provides: `Modality.PROVIDES`. None, for no cache, always passes.
    """
    if tier == "states" and not provides & DIVERGENCES:
        raise ValueError("reference.cache: states: this modality has no hidden states to keep; tokens keeps all there is")
    for term in objective.terms:
        if tier == "sums" and term.reduce == "ld":
            raise ValueError(_too_little("sums", f"loss {term.name} discounts single units (reduce: ld)", "tokens"))
        if tier == "sums" and term.weights != "none":
            raise ValueError(_too_little("sums", f"loss {term.name} weighs single units (weights: {term.weights})", "tokens"))
        if tier in ("sums", "tokens") and (exact := term.needs & DIVERGENCES):
            reason = f"loss {term.name} needs {', '.join(sorted(exact))}, computed from hidden states"
            raise ValueError(_too_little(tier, reason, "states"))


def _too_little(tier: str, reason: str, enough: str) -> str:
    return f"reference.cache: {tier} is too little: {reason}; set reference.cache: {enough}, or false to score every batch anew"


def pack(scores: dict[str, Scores], tier: str) -> list[dict[str, Tensor]]:
    """What the tier keeps of each row of a batch, on the CPU."""
    rows: list[dict[str, Tensor]] = [{} for _ in range(len(next(iter(scores.values())).logp))]
    for branch, s in scores.items():
        columns = _sums(s) if tier == "sums" else _units(s)
        if tier == "states":
            if s.states is None:
                raise ValueError("reference.cache: states: the modality gave no hidden states")
            columns["hidden"] = [h[: len(m)] for h, m in zip(s.states.hidden, columns["mask"], strict=True)]
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row[f"{branch}/{name}"] = value.detach().cpu().contiguous()
    return rows


def unpack(rows: Sequence[dict[str, Tensor]], tier: str, device: torch.device, head: Head | None = None) -> dict[str, Scores]:
    """Scores of a batch from its rows, as wide as the longest of them, which is how a modality makes its batches.

    head: of the reference, for the tier of states.

    A sum comes back as the log-likelihood of the branch's first counted unit and 0 for all others: sums and means over all
    units are what they were, to the last bit.
    """
    found = {}
    for branch in dict.fromkeys(name.rsplit("/", 1)[0] for name in rows[0]):
        if tier == "sums":
            logp, mask = _spread(*(torch.stack(_column(rows, branch, n)) for n in ("sum", "first", "width")))
        else:
            logp, mask = (_padded(_column(rows, branch, name)) for name in ("logp", "mask"))
        states = None
        if head is not None:
            states = States(_padded(_column(rows, branch, "hidden")).to(device), head)
        found[branch] = Scores(logp.to(device), mask.to(device), states=states)
    return found


def _column(rows: Iterable[dict[str, Tensor]], branch: str, name: str) -> list[Tensor]:
    return [row[f"{branch}/{name}"] for row in rows]


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def _sums(s: Scores) -> dict[str, list[Tensor]]:
    total = torch.where(s.mask, s.logp, torch.zeros_like(s.logp)).sum(-1)  # as the objective sums, hence the same bits
    first = torch.where(s.mask.any(-1), s.mask.int().argmax(-1), -1)
    return {"sum": list(total), "first": list(first.int()), "width": list(_width(s).int())}


def _spread(total: Tensor, first: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(int(width.max())) == first[:, None]
    return torch.where(place, total[:, None], 0.0), place


def _units(s: Scores) -> dict[str, list[Tensor]]:
    widths = _width(s).tolist()
    return {name: [row[:n] for row, n in zip(getattr(s, name), widths, strict=True)] for name in ("logp", "mask")}


def _width(s: Scores) -> Tensor:
    """Units up to the last one that counts, at least one: what follows is the padding of this batch. (B,)."""
    places = torch.arange(1, s.mask.shape[1] + 1, device=s.mask.device)
    return torch.where(s.mask, places, 1).amax(-1)
