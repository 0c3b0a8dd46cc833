"""One DPO step on pairs with four images, tower frozen: mmpo against TRL 1.16's `DPOTrainer`, on the same models and tokens.

    python -m benchmarks.vlm_step [--rounds 15] [--out benchmarks/results/vlm_step.json]

Contestants take turns in one process:

    trl          compute_loss with its reference model, backward, clip, AdamW
    trl_cached   the same with the reference's sums in the batch, which TRL itself refuses to make for pairs with images
    online       mmpo.train.advance: every image encoded once, the prompt computed once for both answers
    cached       the same with the reference's scores from the cache on disk; images are encoded at every step
    stored       cached with the images' features from disk as well (model.images.store)

Pictures are processed to patches for both sides before the clock starts. TRL gets a collated batch; mmpo's side includes all of
its own: packing, cache reads, metrics, a line of the log. No time is measured before log-probabilities and gradients agree and
the counted work is what the cost model says; else the exit code is 1. README.md beside this file says what the numbers mean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from benchmarks import counted_work as work
from benchmarks import side_by_side as side
from benchmarks.side_by_side import PAIRS, Case, Contestant
from mmpo.modalities.quiet import quietly
from mmpo.pair import Pair, image, text
from mmpo.progress import Run

IMAGES = 4
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = ("<pad>", "<|im_end|>", "<unk>", "<|im_start|>", *VISION)
# Nothing stands between a turn's end and the next: TRL would take a line break there for a token of the answer, mmpo does not.
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
AROUND = 5  # tokens that the template writes around a question, up to where the answer begins
BARS = {"online": ("trl", 2.2), "cached": ("trl", 2.9)}
ENCODES = {"trl": 4 * IMAGES, "trl_cached": 2 * IMAGES, "online": IMAGES, "cached": IMAGES, "stored": 0}
KINDS = {"online": (False, False), "cached": (True, False), "stored": (True, True)}  # reference cached, features stored


@dataclass(frozen=True)
class Shape(work.Shape):
    """A random Qwen2.5-VL. side, window: of an image and of the tower's windows, in pixels, both multiples of 2 `patch`."""

    side: int = 448
    window: int = 112
    patch: int = 14
    tower: int = 160
    tower_ff: int = 320
    tower_layers: int = 8
    tower_heads: int = 4
    whole: tuple[int, ...] = (3, 7)  # layers whose patches see all of the image

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Of an image: four patches each."""
        return self.patches // 4

    @property
    def encode(self) -> float:
        """Operations that make one image's features: patches, layers, merger."""
        width, window = self.tower, (self.window // self.patch) ** 2
        seen = len(self.whole) * self.patches + (self.tower_layers - len(self.whole)) * window
        linear = 2 * 3 * self.patch**2 * width + self.tower_layers * (4 * width**2 + 3 * width * self.tower_ff)
        merger = (4 * width) ** 2 + 4 * width * self.hidden
        return 2 * self.patches * linear + 4 * self.patches * seen * width + 2 * self.tokens * merger


CASES = (Case(1062, 40, BARS, saved=0.56, encodes=ENCODES),)


# ---- what both are given


def make_models(folder: Path, shape: Shape, seed: int = 0) -> tuple[Path, Path]:
    """Directories of a policy and of a reference whose language model is a little away from it; both have the same tower."""
    processor = _processor(shape)
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(_config(shape, processor.tokenizer))
    language = [p for name, p in model.named_parameters() if ".visual." not in name]
    for path in (folder / "policy", folder / "reference"):
        with quietly():
            model.save_pretrained(path)
            processor.save_pretrained(path)
        with torch.no_grad():
            for parameter in language:
                parameter.add_(0.002 * torch.randn_like(parameter))
    return folder / "policy", folder / "reference"


def _config(shape: Shape, tokenizer: Any) -> Any:
    half = shape.hidden // shape.heads // 2
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [half - 2 * (half * 3 // 8), *[half * 3 // 8] * 2]}
    scale = {"initializer_range": shape.hidden**-0.5}  # with transformers' 0.02 an answer would hardly depend on its images
    words = {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "intermediate_size": shape.ff, "vocab_size": shape.vocab,
        "max_position_embeddings": 8192, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **scale,
    }  # fmt: skip
    tower = {
        "depth": shape.tower_layers, "hidden_size": shape.tower, "intermediate_size": shape.tower_ff,
        "num_heads": shape.tower_heads, "patch_size": shape.patch, "window_size": shape.window,
        "out_hidden_size": shape.hidden, "fullatt_block_indexes": list(shape.whole), **scale,
    }  # fmt: skip
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, VISION, strict=True)}
    return transformers.Qwen2_5_VLConfig(text_config=words, vision_config=tower, tie_word_embeddings=False, **ids, **scale)


def _processor(shape: Shape) -> Any:
    """One token per word; images of any size become those of the shape."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    names = [*SPECIAL, "user", "assistant", *(f"w{i}" for i in range(shape.vocab - len(SPECIAL) - 2))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    special = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    size = {"patch_size": shape.patch, "size": {"shortest_edge": shape.side**2, "longest_edge": shape.side**2}}
    pictures, videos = transformers.Qwen2VLImageProcessor(**size), transformers.Qwen2VLVideoProcessor(**size)
    return transformers.Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=TEMPLATE)


def make_rows(case: Case, shape: Shape, count: int = PAIRS, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in TRL's columns: four pictures of noise, one turn of random words, two answers; both sides add the end of turn."""
    rng = np.random.default_rng(seed)

    def said(role: str, tokens: int) -> list[dict[str, str]]:
        words = " ".join(f"w{i}" for i in rng.integers(0, shape.vocab - len(SPECIAL) - 2, tokens))
        return [{"role": role, "content": words}]

    def drawn() -> Any:
        return Image.fromarray(rng.integers(0, 256, (shape.side, shape.side, 3), np.uint8))

    question = case.prompt - IMAGES * (shape.tokens + 2) - AROUND
    return [
        {
            "images": [drawn() for _ in range(IMAGES)], "prompt": said("user", question),
            "chosen": said("assistant", case.answer - 1), "rejected": said("assistant", case.answer - 1),
        }
        for _ in range(count)
    ]  # fmt: skip


# ---- the contestants


def trl_contestants(paths: tuple[Path, Path], rows: list[dict[str, Any]], folder: Path) -> list[Contestant]:
    with quietly():
        kind = transformers.AutoModelForImageTextToText
        policy, reference = (kind.from_pretrained(path, dtype=torch.float32) for path in paths)
        processor = transformers.AutoProcessor.from_pretrained(paths[0])
    policy.model.visual.requires_grad_(False)
    return side.trl_contestants(side.trl_trainer(policy, reference, processor, rows, folder))


def mmpo_run(paths: tuple[Path, Path], rows: list[dict[str, Any]], folder: Path, name: str, cached: bool, stores: bool) -> Run:
    """A run of the vlm modality over the rows."""
    settings = ["model.layout=shared", "model.train=language", f"model.images.store={str(stores).lower()}"]
    pairs = [_pair(str(number), row) for number, row in enumerate(rows)]
    return side.mmpo_run(folder / name, "vlm", paths, settings, pairs, cached)


def _pair(name: str, row: dict[str, Any]) -> Pair:
    said = {side: text(row[side][0]["content"]) for side in ("prompt", "chosen", "rejected")}
    shown = [image(np.asarray(picture)) for picture in row["images"]]
    return Pair(name, (*shown, said["prompt"]), (said["chosen"],), (said["rejected"],))


def contestants(folder: Path, case: Case, shape: Shape) -> list[Contestant]:
    """All of them, with the same weights; the caches are filled."""
    paths, rows = make_models(folder, shape), make_rows(case, shape)
    ours = mmpo_contestants(paths, rows, folder)
    order = side.order_of(ours["online"])
    theirs = trl_contestants(paths, [rows[i] for i in order], folder)
    return [*theirs, *(side.mmpo_contestant(name, run) for name, run in ours.items())]


def mmpo_contestants(paths: tuple[Path, Path], rows: list[dict[str, Any]], folder: Path) -> dict[str, Run]:
    """mmpo's runs by name. Each has met every pair: caches are filled, pictures processed."""
    runs = {name: mmpo_run(paths, rows, folder, name, *kind) for name, kind in KINDS.items()}
    for run in runs.values():
        side.fill(run)
    return runs


# ---- the work


def expected(case: Case, shape: Shape) -> dict[str, float]:
    """The cost model's operations of a step: the language model's, and an encode of each image where it is not stored."""
    language = {name: work.model_flops(case.prompt, case.answer, shape, cached) for name, (cached, _) in KINDS.items()}
    return {name: flops + case.encodes[name] * shape.encode for name, flops in language.items()}


def counted(contestant: Contestant, shape: Shape) -> dict[str, int]:
    with images_met(contestant) as met:
        contestant.step(0)
    return work.counts(contestant.step, contestant.loss, contestant.model, shape) | {"encodes": sum(met)}


@contextmanager
def images_met(contestant: Contestant) -> Iterator[list[int]]:
    """How many images each call of a tower is given, of the policy's and of the reference's, until the context ends."""
    met: list[int] = []

    def hook(module: Any, args: Any, named: dict[str, Tensor]) -> None:
        met.append(len(named["grid_thw"]))

    towers = {id(m): m for m in (contestant.model.model.visual, contestant.reference.model.visual)}  # type: ignore[union-attr]
    hooks = [tower.register_forward_pre_hook(hook, with_kwargs=True) for tower in towers.values()]  # type: ignore[union-attr]
    try:
        yield met
    finally:
        for handle in hooks:
            handle.remove()


def bench(cases: Sequence[Case], shape: Shape) -> side.Bench:
    return side.Bench(
        "One DPO step on pairs with images: mmpo against TRL 1.16.", cases,
        lambda folder, case: contestants(folder, case, shape),
        lambda contestant: counted(contestant, shape), lambda case: expected(case, shape),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return side.main(bench(CASES, Shape()), arguments)


if __name__ == "__main__":
    sys.exit(main())
