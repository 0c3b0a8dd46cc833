"""What every family of vision-language models owes, as functions of a checkpoint: two of them run fast, all of them slowly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from mmpo import export, launch, recipe
from mmpo.datasets.formats.mmpo import write_mmpo
from mmpo.modalities import vlm_model
from mmpo.modalities.vlm import Adapter
from mmpo.pair import Branch, Pair, text
from mmpo.reference import trainable
from tests.modalities.tiny_vlm import adapter, asked, conversation, drawn, moved, pair, plain, shot

RECIPE = """
modality: vlm
model: {{path: {model}, lora: {{rank: 2}}, sample: {{max_new_tokens: 4}}}}
data: {{path: {data}, heldout: 0.2}}
objective:
  - {{loss: dpo, beta: 0.1}}
  - {{loss: dpo, beta: 0.1, of: [chosen, chosen@retrieved]}}
train: {{steps: 2, batch_size: 4, lr: 0.01, warmup: 0}}
eval: {{every: 2, pairs: 2}}
"""


def likelihoods_are_those_of_plain_transformers(folder: Path) -> None:
    """1, 2 and 5 images, the plain call padded on either side, of the adapted policy; every image encoded once."""
    ours = adapter(folder)
    moved(ours.model)
    for count in (1, 2, 5):
        row, before = pair(count, first=10 * count), ours.encodes
        batch = drawn(ours, [row])
        with torch.no_grad():
            scores = ours.score(ours.model, batch)
            ours.score(ours.model, batch)  # as the reference does
        for side in ("left", "right"):
            for name, expected in zip(("chosen", "rejected"), plain(ours.model, folder, row, side), strict=True):
                found = scores[name].logp[0][scores[name].mask[0]]
                assert found.shape == expected.shape
                assert float((found - expected).abs().max()) <= 1e-5, (count, side, name)
        assert ours.encodes - before == count


def shared_rows_are_separate_rows(folder: Path, layout: str = "shared") -> None:
    """Likelihoods and gradients of packed rows are those of a padded row per answer, with and without images in the batch."""
    rows = [pair(2, "two"), Pair("none", (text("Who jumps?"),), (text("a dog"),), (text("the fox"),)), pair(1, "one")]
    found = {}
    for name in (layout, "padded"):
        ours = adapter(folder, layout=name)
        moved(ours.model)
        before, batch = ours.encodes, drawn(ours, rows)
        assert batch.layout == name
        # one photo stands alone and among others, which some processors show at less detail
        assert ours.encodes - before == len(batch.pictures) == (3 if ours.processed.counts_images else 2)
        scores = ours.score(ours.model, batch)
        (scores["chosen"].logp.sum() - 0.7 * scores["rejected"].logp.sum()).backward()
        found[name] = scores, torch.cat([p.grad.flatten() for p in trainable(ours.model).values() if p.grad is not None])
    (packed, gradient), (apart, expected) = found[layout], found["padded"]
    for branch, own in packed.items():
        assert float((own.logp - apart[branch].logp).detach().abs().max()) <= 1e-5
    assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm()) > 0


def training_saves_what_plain_libraries_load(folder: Path, tmp: Path) -> None:
    """Two steps of the training loop, whose export gives the policy's likelihoods in plain transformers and peft.

    Some rows have no images, and a term of the objective reads a branch with another image.
    """
    rows = []
    for i in range(8):
        images = (shot(i), shot(i + 1)) if i % 4 else ()
        made = Pair(f"p{i}", asked(*images), (text(f"a dog {i}"),), (text("the fox"),))
        other = Branch(asked(*map(shot, range(len(images)))), made.chosen)
        rows.append(replace(made, branches={"chosen@retrieved": other}))
    write_mmpo(rows, tmp / "data")
    (tmp / "recipe.yaml").write_text(RECIPE.format(model=folder, data=tmp / "data"))
    launch.run(recipe.load(tmp / "recipe.yaml", [f"out={tmp / 'run'}"]))
    lines = [json.loads(line) for line in (tmp / "run" / "log.jsonl").read_text().splitlines()]
    assert any("logps/chosen@retrieved" in line for line in lines)
    _, ours, _ = export.open_run(tmp / "run")
    rows = [row for row in rows if len(row.prompt) > 1]
    base = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp / "run" / "export").eval()
    scores = _scores(ours, rows[0])
    for name, expected in zip(("chosen", "rejected"), plain(theirs, tmp / "run" / "export", rows[0], "right"), strict=True):
        assert float((scores[name] - expected).abs().max()) <= 1e-5
    with theirs.disable_adapter():
        away = plain(theirs, folder, rows[0], "right")[0] - scores["chosen"]
    assert float(away.abs().max()) > 1e-4


def trained(ours: Adapter) -> list[str]:
    """Names of what trains, all of which has a gradient."""
    ours.score(ours.model, drawn(ours, [pair(1)]))["chosen"].logp.sum().backward()
    names = [n for n, p in ours.model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None for p in ours.model.parameters() if p.requires_grad)
    return names


def the_projector_trains(folder: Path, tmp: Path, how: Any) -> Adapter:
    """Tower frozen, language model and projector with gradient, and an export that plain libraries load."""
    ours = adapter(folder, adapter=how, train="language+projector")
    names = trained(ours)
    between = [n for n in names if not any(part in n for part in ("language_model.", "text_model.", "lm_head."))]
    assert between and len(between) == len(vlm_model.projector_parameters(ours.model))
    moved(ours.model, 0.05)
    ours.save(ours.model, tmp)
    policy, base, size = ours.check_export(ours.model, tmp)
    assert policy <= 1e-5 * size < base
    return ours


def generation_is_that_of_transformers(folder: Path) -> None:
    """Greedy answers to prompts of 0, 1 and 3 images in one batch, each as transformers' own generate gives it alone."""
    ours = adapter(folder, sample={"max_new_tokens": 5, "temperature": 0.0})
    processor = transformers.AutoProcessor.from_pretrained(folder)
    prompts = [asked(*map(shot, range(count))) for count in (1, 3)] + [(text("Who jumps?"),)]
    found = ours.sample(ours.model, prompts, [0, 1, 2])
    plain_model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    for prompt, block in zip(prompts, found, strict=True):
        inputs = processor.apply_chat_template(
            conversation(Pair("", prompt)), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        made = plain_model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert block.data == processor.tokenizer.decode(made, skip_special_tokens=True)


def _scores(ours: Adapter, row: Pair) -> dict[str, Tensor]:
    with torch.no_grad():
        scores = ours.score(ours.model, drawn(ours, [row]))
    return {name: s.logp[0][s.mask[0]] for name, s in scores.items()}
