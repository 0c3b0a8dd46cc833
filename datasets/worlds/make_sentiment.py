"""How the shipped candidates of the sentiment world were made: answers of SmolLM2-135M-Instruct, judged by VADER.

mmpo assets add smollm2
mmpo make-base smollm2 --out DIR         a few minutes on 2 cores: sampled, not trained
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import trange

from mmpo.cache import Cache
from mmpo.datasets.formats.candidates import write_candidates
from mmpo.datasets.pairing import Candidate
from mmpo.datasets.worlds import sentiment
from mmpo.find import find
from mmpo.modalities.text import Adapter
from mmpo.modalities.text_config import ModelConfig, SampleConfig
from mmpo.pair import text
from mmpo.schema import DrawConfig

MODEL = "asset:smollm2"
TOKENS = 20  # of an answer, as configs/text_smollm2.yaml samples
BATCH = 64


@dataclass(frozen=True)
class Budget:
    """How much of everything. The defaults are what the shipped candidates were made with."""

    prompts: int = 128
    candidates: int = 8


def make(out: Path | str, *, seed: int = 0, model: str = MODEL, **budget: int) -> None:
    """Sample and judge, and write out/candidates.parquet. Blank answers are left out."""
    spec, out = Budget(**budget), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = ModelConfig(path=model, sample=SampleConfig(max_new_tokens=TOKENS))
    adapter = Adapter(config, DrawConfig(), Cache(None), torch.device("cpu"))
    asked = [p for p in sentiment.prompts()[: spec.prompts] for _ in range(spec.candidates)]
    rows: list[Candidate] = []
    for start in trange(0, len(asked), BATCH, desc="candidates", unit="batch"):
        part = [(text(p),) for p in asked[start : start + BATCH]]
        seeds = [seed * 1_000_000 + start + i for i in range(len(part))]
        blocks = adapter.sample(adapter.model, part, seeds)
        rows += [Candidate(p, b, seed=s) for p, b, s in zip(part, blocks, seeds, strict=True) if str(b.data).strip()]
    judge = find("judges", "sentiment")()
    scores = judge([c.prompt for c in rows], [(c.block,) for c in rows]).scores.tolist()
    scored = [dataclasses.replace(c, score=round(s, 4)) for c, s in zip(rows, scores, strict=True)]
    write_candidates(scored, out / "candidates.parquet")
