"""How far the answers of a dataset are from what a model would say itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from mmpo.cache import Cache
from mmpo.datasets.audit import Finding
from mmpo.errors import DataError
from mmpo.find import find, model_config
from mmpo.modality import DrawKey
from mmpo.pair import Pair
from mmpo.schema import DrawConfig

STRANGE = -2.5  # nats a token; a model's own samples at temperature 1 lie near minus its entropy, about -1 to -1.5
GAP = 0.5  # nats a token by which the two sides may differ
BATCH = 4


def off_policy(pairs: Sequence[Pair], path: str) -> Finding:
    """The mean log-probability of a token of each side under the model in `path`, averaged over the pairs.

    An alarm means that both sides are strange to the model, or that one of them is much more so than the other: then the
    margin of a reference is large before anything is learnt, and likelihood is lost on both sides in training.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config("text")(path=path, adapter="full")
    adapter = find("modalities", "text")(config, DrawConfig(), Cache(None), device)
    kept, left = adapter.admit(pairs)
    if not kept:
        raise DataError(f"{path}: none of the {len(pairs)} pairs fits into the model ({dict(left)})")
    means: dict[str, list[float]] = {"chosen": [], "rejected": []}
    adapter.model.eval()
    for start in range(0, len(kept), BATCH):
        part = kept[start : start + BATCH]
        with torch.no_grad():
            batch = adapter.draw(adapter.encode(part), [DrawKey(0, p.id, 0) for p in part], adapter.model)
            scores = adapter.score(adapter.model, batch)
        for side, found in scores.items():
            means[side] += ((found.logp * found.mask).sum(1) / found.mask.sum(1)).tolist()
    chosen, rejected = (statistics.fmean(means[side]) for side in ("chosen", "rejected"))
    likelier = statistics.fmean(float(a > b) for a, b in zip(means["chosen"], means["rejected"], strict=True))
    numbers = {
        "chosen": chosen,
        "rejected": rejected,
        "pairs": len(kept),
        "chosen_likelier": likelier,
        "left_out": sum(left.values()),
    }
    said = (
        f"{chosen:.2f} nats a token for chosen and {rejected:.2f} for rejected answers under {path} ({len(kept)} pairs); "
        f"chosen is the likelier side in {likelier:.1%}"
    )
    return Finding(
        "off-policy", max(chosen, rejected) < STRANGE or abs(chosen - rejected) > GAP, numbers, said,
        "these are not the model's own answers: fine-tune on the chosen ones first, add an nll anchor, or sample and judge "
        "answers of the model itself (train.rounds)",
    )  # fmt: skip
