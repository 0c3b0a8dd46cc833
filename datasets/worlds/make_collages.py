"""How the shipped base model and candidates of the collages world were made: a LlavaForConditionalGeneration, from scratch.

    mmpo make-base vlm --out DIR             a few minutes on 2 cores; --steps makes it shorter

It first names all digits of a collage, then answers questions about one of them, and a share of those answers (`WRONG`) names
the digit of another panel, as careless people mix up the pictures. So it mostly reads digits well and answers for another
image about one time in four, which is what MIA-DPO's pairs can mend. A fifth of the digits is never shown to it.

The candidates are the right answer to each question and its own, from the stages of `mmpo pairs collage`. Questions about
digits it has never seen are held out of training by data.heldout of configs/vlm.yaml: only such collages are kept, of both
sorts, as that rule, which reads their bytes alone, puts on the right side.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from tqdm import trange
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmpo.datasets.builders import collage
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.stages import Dropped, Record, each, execute
from mmpo.datasets.tools import Generator, Tools
from mmpo.datasets.worlds.collages import (
    GRID,
    NAME_ALL,
    PANEL,
    QUESTION,
    answer,
    asked,
    digits,
    heldout_digits,
    named,
    truth,
    verify,
)
from mmpo.media import open_image
from mmpo.modalities.vlm_generate import generator
from mmpo.pair import Block, image, text
from mmpo.prepare import is_heldout

WRONG = 0.25  # share of training answers that name the digit of another panel
HELDOUT = 0.2  # data.heldout of configs/vlm.yaml
NAMING = 0.25  # share of the steps in which all digits are named, and nothing is asked about one
USER, ASSISTANT, END, PAD, IMAGE = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<image>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIDE = GRID * PANEL  # pixels of a collage, which the processor leaves as it is
PATCHES = GRID**2  # one for each panel
EVEN = 1 / PATCHES  # share of the attention that the asked panel has to undercut; the paper's 0.5 keeps 96 % of these pairs
BATCH, LR, SPREAD = 64, 2e-3, 0.1
ANSWER = 8  # tokens of the longest answer, more than there are in a right one


@dataclass(frozen=True)
class Budget:
    """How much of everything. The defaults are what the shipped model was made with."""

    steps: int = 500
    prompts: int = 4000
    select: str = "attention"


def make(out: Path | str, *, seed: int = 0, **budget: Any) -> None:
    """Train the base and let it answer into `out`: a Hugging Face directory and candidates.parquet."""
    spec, out = Budget(**budget), Path(out)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    train_model(model, tokenizer, spec.steps, seed + 1)
    save(model, make_processor(tokenizer), out)
    answers = generator(out, "cpu", batch_size=BATCH)
    rows = make_candidates(answers, spec.prompts, seed + 2, select=spec.select)
    write_candidates(rows, out / "candidates.parquet")


# ---- the model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the pieces of the world's own sentences, and the marks of turns and images: any text at all can be spelt."""
    spelling = Tokenizer(BPE())
    spelling.pre_tokenizer = ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    says = [asked(place) for place in range(10)] + [NAME_ALL, named(range(10)), *map(answer, range(10))]
    trainer = BpeTrainer(vocab_size=320, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    spelling.train_from_iterator(says, trainer)
    spelling.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, END, USER, ASSISTANT, IMAGE)])
    return PreTrainedTokenizerFast(tokenizer_object=spelling, eos_token=END, pad_token=PAD, model_max_length=256)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures of any size become SIDE x SIDE pixels; those of the world stay as they are."""
    side = {"height": SIDE, "width": SIDE}
    half = [0.5] * 3
    images = CLIPImageProcessor(size=side, do_center_crop=False, image_mean=half, image_std=half)
    places = {"patch_size": PANEL, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, tokenizer, chat_template=TEMPLATE, **places)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """The untrained model, 0.46 M parameters: a tower of two layers, a language model of three."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=PANEL,
        initializer_range=SPREAD,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=SPREAD, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=PATCHES, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=True, initializer_range=SPREAD,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def train_model(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Next-token training on the assistant's words about collages of digits that may be shown."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=max(steps, 2), pct_start=0.1)
    for step in trange(steps, desc="vision-language model"):
        ids, labels, pixels = lesson(tokenizer, rng, BATCH, naming=step < NAMING * steps)
        loss = model(input_ids=ids, labels=labels, pixel_values=pixels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def lesson(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, count: int, naming: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Collages of drawn digits and what is said about them: ids and labels (count, L), -100 on the prompt; and pixels.

    naming: all digits are named; otherwise one is asked for, and WRONG of the answers are the digit of another panel.
    """
    tiles, which = digits()
    drawn = rng.choice(np.flatnonzero(~heldout_digits()), (count, PATCHES))
    shown, places = which[drawn], rng.integers(PATCHES, size=count)
    slips = np.where(rng.random(count) < WRONG, rng.integers(1, PATCHES, size=count), 0)
    told = shown[np.arange(count), (places + slips) % PATCHES]
    said = [named(row) for row in shown] if naming else [answer(digit) for digit in told]
    questions = [NAME_ALL] * count if naming else [asked(place) for place in places]
    starts = [f"{USER}{IMAGE * PATCHES}{question}{ASSISTANT}" for question in questions]
    ids = tokenizer([a + b + END for a, b in zip(starts, said, strict=True)], return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(starts[0]).input_ids)] = -100
    return ids, labels, seen(collages(tiles[drawn]))


def collages(tiles: np.ndarray) -> np.ndarray:
    """Pictures (n, SIDE, SIDE) of tiles (n, PATCHES, PANEL, PANEL), as the builder of collages lays them out."""
    return tiles.reshape(-1, GRID, GRID, PANEL, PANEL).swapaxes(2, 3).reshape(-1, SIDE, SIDE)


def seen(pictures: np.ndarray) -> Tensor:
    """Grey pictures (n, H, W) uint8 as the processor hands them to the tower: (n, 3, H, W), from -1 to 1."""
    return (torch.from_numpy(pictures).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write model and processor with the weights in half precision, to be loaded in single precision."""
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    file = out / "config.json"
    told = json.loads(file.read_text())
    for part in (told, told["text_config"], told["vision_config"]):
        part["dtype"] = "float32"
    file.write_text(json.dumps(told, indent=2) + "\n")


# ---- its answers


def make_candidates(speaker: Generator, prompts: int, seed: int, *, select: str = "attention") -> list[Candidate]:
    """The right answers to questions about collages, and the model's own wrong ones where MIA-DPO makes a pair of them.

    prompts: questions about digits that may be shown; those without a pair are left out. A quarter as many are about the
    others, and all of them are kept. select: pairs whose model was looking elsewhere (`attention`), or `random` ones, as many.
    """
    found = []
    for held, count in ((False, prompts), (True, prompts // 4)):
        asked_of, pairs = _questions(held, count, speaker, seed)
        if not held:
            pairs = _selected(pairs, select, seed)
        for record in asked_of:
            if held or record.id in pairs:
                prompt = record.fields["asked"]
                found.append(Candidate(prompt, text(truth(prompt)), 1.0, 0))
                if record.id in pairs:
                    (own,) = pairs[record.id].fields["pair"].rejected
                    found.append(Candidate(prompt, own, float(verify(prompt, str(own.data)).correct), 1))
    return found


def _questions(held: bool, count: int, speaker: Generator, seed: int) -> tuple[list[Record], dict[str, Record]]:
    """Composed questions about the digits of one sort, and by id those of them of which a pair was made."""
    pool, tools = _Sheet(held), Tools(generator=speaker)
    context = collage.prepare(pool.records(1), tools, media=pool, seed=seed)  # type: ignore[arg-type]
    stages = collage.collage(
        tools, pool=context, kinds={"grid": 1.0}, grid_counts={PATCHES: 1.0}, tile=PANEL, margin=0, label=0,
        grid_ratios={PATCHES: 2.0}, min_perplexity=0.0, max_new_tokens=ANSWER, batch=BATCH,
    )  # fmt: skip
    ledger, names = Ledger("skip"), [stage.name for stage in stages]
    before = [*stages[: names.index("answer")], each("split", functools.partial(_split, held=held))]
    rows = execute(pool.records(-(-count * 8 // pool.size)), before, seed=seed, ledger=ledger)
    composed = list(itertools.islice(rows, count))
    after = stages[names.index("answer") :]
    return composed, {record.id: record for record in execute(composed, after, seed=seed, ledger=ledger)}


def _split(record: Record, random: np.random.Generator, *, held: bool) -> Record:
    """The question with its picture as a small file. Raises Dropped where that puts it on the wrong side of the split."""
    prompt = tuple(image(_small(block)) if block.kind == "image" else block for block in record.fields["asked"])
    if is_heldout(prompt, HELDOUT) != held:
        raise Dropped("on the other side of the split")
    return record.having(asked=prompt)


def _small(block: Block) -> bytes:
    """The same pixels as a grey PNG of few bytes."""
    out = io.BytesIO()
    open_image(block).convert("L").save(out, "PNG", optimize=True)
    return out.getvalue()


def _selected(pairs: dict[str, Record], select: str, seed: int) -> dict[str, Record]:
    """The pairs that MIA-DPO's selection keeps, or as many drawn at random. Raises ValueError for another word."""
    kept = [name for name, record in pairs.items() if record.fields["ratio"] < EVEN]
    if select == "random":
        kept = np.random.default_rng(seed).permutation(sorted(pairs))[: len(kept)].tolist()
    elif select != "attention":
        raise ValueError(f"select: expected attention or random, found {select!r}")
    return {name: pairs[name] for name in kept}


class _Sheet:
    """The digits of one sort as a store of images (`mmpo.datasets.media_store`) that needs no files."""

    def __init__(self, held: bool) -> None:
        tiles, which = digits()
        own = np.flatnonzero(heldout_digits() == held)
        blocks = [image(_small(Block("image", np.repeat(tiles[i][..., None], 3, -1)))) for i in own]
        self.blocks = {block.digest: block for block in blocks}
        self.answers = {block.digest: answer(int(which[i])) for i, block in zip(own, blocks, strict=True)}
        self.size = len(blocks)

    def records(self, times: int) -> Iterator[Record]:
        """A question about each digit, again and again in another order."""
        for again in range(times):
            for key in np.random.default_rng(again).permutation(sorted(self.blocks)):
                yield Record(f"{key}/{again}", (self.blocks[key], text(QUESTION)), self.answers[key])

    def keep(self, block: Block) -> str:
        return block.digest

    def load(self, key: str) -> Block:
        return self.blocks[key]
