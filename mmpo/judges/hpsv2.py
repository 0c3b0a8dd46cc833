"""HPSv2: a CLIP ViT-H-14 tuned on human choices between pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmpo.clip import load_clip
from mmpo.judging import Blocks, Judge, JudgeResult, score_in_batches
from mmpo.limits import Count


def hpsv2(
    path: str | Path | None = None,
    device: str = "cpu",
    *,
    architecture: str = "ViT-H-14",
    allow_download: bool = False,
    batch_size: Count = 16,
) -> Judge:
    """Human Preference Score v2 and v2.1 (arXiv 2306.09341): 100 cos(text, image). Comparable within one prompt set only.

    path: the authors' checkpoint (HPS_v2.1_compressed.pt, or v2), or the same weights as safetensors. allow_download: with
    no path, fetch v2.1 from the authors' hub repository. Raises ValueError when there are no weights.
    """
    if path is None and allow_download:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    clip = load_clip(path, architecture, device, "hpsv2")

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        return JudgeResult(100 * score_in_batches(clip.cosine, prompts, answers, batch_size))

    return judge
