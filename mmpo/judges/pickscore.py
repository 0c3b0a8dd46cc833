"""PickScore: a CLIP ViT-H-14 tuned on the choices of Pick-a-Pic's users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from mmpo.judging import Blocks, Judge, JudgeResult, existing, score_in_batches
from mmpo.limits import Count
from mmpo.weights import loading

HUB = "yuvalkirstain/PickScore_v1"


def pickscore(
    path: str | Path | None = None,
    device: str = "cpu",
    *,
    allow_download: bool = False,
    batch_size: Count = 16,
) -> Judge:
    """PickScore (arXiv 2305.01569): exp(logit_scale) cos(text, image), about 18 to 24.

    The probability that users prefer one of two pictures is the softmax of their scores. path: a directory with a
    transformers CLIPModel (safetensors) and its processor. allow_download: path may be a hub id, by default the authors'.
    Raises ValueError when there are no weights.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    source = (
        str(path or HUB) if allow_download else existing(path, "pickscore", "a directory with a CLIPModel and its processor")
    )
    with loading(source, "a CLIPModel as safetensors and its processor"):
        model = CLIPModel.from_pretrained(source, local_files_only=not allow_download, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(source, local_files_only=not allow_download)
        processor = CLIPImageProcessor.from_pretrained(source, local_files_only=not allow_download)
    model = model.float().to(device).eval().requires_grad_(False)
    length = model.config.text_config.max_position_embeddings

    def score(captions: list[str], pictures: list[Image.Image]) -> Tensor:
        tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(device)
        pixels = processor(pictures, return_tensors="pt")["pixel_values"].to(device)
        output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        return model.logit_scale.exp() * (output.text_embeds * output.image_embeds).sum(-1)

    def judge(prompts: Sequence[Blocks], answers: Sequence[Blocks]) -> JudgeResult:
        return JudgeResult(score_in_batches(score, prompts, answers, batch_size))

    return judge
