"""CLIP score: how well a picture fits its caption, by the cosine of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmpo.clip import load_clip
from mmpo.judging import Blocks, Judge, JudgeResult, score_in_batches
from mmpo.limits import Count


def clip_score(
    path: str | Path | None = None,
    device: str = "cpu",
    *,
    architecture: str = "ViT-H-14",
    allow_download: bool = False,
    batch_size: Count = 16,
) -> Judge:
    """CLIPScore (arXiv 2104.08718) without its clipping at 0 and factor 2.5: 100 cos(text, image), as Diffusion-DPO reports.

    path: an open_clip checkpoint file of `architecture`, or a directory with open_clip_config.json. allow_download: with no
    path, fetch the LAION-2B weights of ViT-H-14. Raises ValueError when there are no weights.
    """
    clip = load_clip(path, architecture, device, "clip_score", "laion2b_s32b_b79k" if allow_download else None)

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        return JudgeResult(100 * score_in_batches(clip.cosine, prompts, answers, batch_size))

    return judge
