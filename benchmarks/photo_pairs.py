"""Every builder of pairs on real photographs with small real models, through the command line, five pairs of each to read.

    mmpo assets add smollm2
    mmpo assets add minilm
    python -m benchmarks.photo_pairs --out DIR [--opencv FOLDER]

The photographs are scikit-image's and scikit-learn's, with answers that a person wrote; FOLDER: Debian's opencv-doc,
examples/data, for twenty more. No vision-language model can be had without a download, so what answers is two models:
EfficientNet-lite0 names what each picture and its quarters show, and SmolLM2-135M writes a sentence from these names. It has no
attention on pictures, so `collage` selects nothing; hidden images are names withheld. MiniLM judges, by how near an answer
comes to the known one.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from mmpo import packaged
from mmpo.datasets.embedders.efficientnet_lite0 import network
from mmpo.datasets.embedders.sentence import sentence
from mmpo.datasets.judge_tools import HOLDS
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import pairs
from mmpo.datasets.tools import Answer, Prompt
from mmpo.media import open_image
from mmpo.modalities.text_sample import choose
from mmpo.pair import Block, Pair, text

ASK = "Describe the picture in two sentences."
PHOTOS = {
    "astronaut.png": "A woman in an orange space suit smiles at the camera. Behind her are a flag and a model of a shuttle.",
    "camera.png": "A man in a dark coat looks through a camera on a tripod. He stands on a lawn in front of a city.",
    "chelsea.png": "A ginger cat looks at something beside the camera. Its eyes are green.",
    "coffee.png": "A cup of espresso stands on a red saucer. A spoon lies beside the cup on a wooden table.",
    "rocket.jpg": "A white rocket stands on its launch pad at dusk. Four tall lightning towers surround it.",
    "coins.png": "Four rows of old coins lie on a dark ground. Their faces are worn.",
    "motorcycle_left.png": "A red motorcycle stands in a workshop. Behind it are shelves and a white board.",
    "hubble_deep_field.jpg": "Many distant galaxies shine in a black sky. Some of them are orange and some are blue.",
    "moon.png": "The grey surface of the moon is covered with craters. There is no colour in the picture.",
    "brick.png": "A wall is built of bricks. The joints between them are light.",
    "grass.png": "Dry grass covers the ground. The picture is black and white.",
    "gravel.png": "The ground is covered with gravel. The stones are small.",
    "china.jpg": "A Chinese tower with green and red roofs stands on a hill. Trees grow around it.",
    "flower.jpg": "An orange dahlia is in full bloom. The background is dark green.",
    "page.png": "A printed page is lit unevenly. Its heading is about segmentation.",
}
OPENCV = {
    "apple.jpg": "A red and yellow apple lies on a table. The background is green.",
    "orange.jpg": "An orange lies on a table. The background is blue and green.",
    "fruits.jpg": "Slices of orange lie beside a lime and a kiwi. There are purple grapes behind them.",
    "baboon.jpg": "A baboon looks into the camera. It has a red nose and blue cheeks.",
    "board.jpg": "A green circuit board is full of electronic parts. A large chip is at its right.",
    "building.jpg": "A white office building stands behind trees. It has many windows.",
    "butterfly.jpg": "A black and white butterfly sits on a plant. The leaves behind it are green.",
    "chicky_512.png": "A brown dog with a black nose opens its mouth. It sits on a chair.",
    "home.jpg": "A yellow house with a tower stands under a blue sky. It has green shutters.",
    "leuvenA.jpg": "An old street of brick houses is empty. The sky is grey.",
    "licenseplate_motion.jpg": "A silver car is seen from behind. The picture is blurred by motion.",
    "messi5.jpg": "A footballer in a red and blue shirt kicks a ball. He plays on a green field.",
    "squirrel_cls.jpg": "A squirrel sits on a branch and eats. Green leaves are behind it.",
    "starry_night.jpg": "A painting shows a night sky with swirling stars. A dark cypress rises above a village.",
    "aloeL.jpg": "An aloe grows in a brown pot. The wallpaper behind it has a pattern of flowers.",
    "aero1.jpg": "A town is seen from the air. There are fields and a road around it.",
    "cards.png": "Many playing cards lie in a heap. All of them are diamonds or hearts.",
    "sudoku.png": "A sudoku is printed on a page. Most of its squares are empty.",
    "smarties.png": "Coloured balls lie on a white ground. They are red, blue and green.",
    "box_in_scene.png": "Books and boxes lie in a heap. The picture is black and white.",
}


# ---- a model that looks and a model that writes


class Looking:
    """A Generator (`mmpo.datasets.tools`): what the classifier names of the pictures, put into words by the language model."""

    def __init__(self, folder: Path) -> None:
        import transformers
        from timm.data import ImageNetInfo, create_transform, resolve_data_config

        self.eyes, self.seen = network(), dict[str, str]()
        self.prepare = create_transform(**resolve_data_config({}, model=self.eyes))
        self.label = ImageNetInfo().index_to_description
        self.tokens = transformers.AutoTokenizer.from_pretrained(folder)
        self.words = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, max_new_tokens: int = 512, temperature: float = 0.0,
        hide_images: float = 0.0, prefixes: Sequence[str] | None = None, attention: bool = False,
        hide_seeds: Sequence[int] | None = None,
    ) -> list[Answer]:  # fmt: skip
        """All pictures are hidden or none, so that `hide_seeds` decide nothing."""
        begun = prefixes or [""] * len(prompts)
        asked = [self._asked(p, hide_images) for p in prompts]
        limit = min(max_new_tokens, 48)  # of a language model that does not stop by itself
        return [self._answer(a, s, b, limit, temperature) for a, s, b in zip(asked, seeds, begun, strict=True)]

    def _asked(self, prompt: Prompt, hidden: float) -> str:
        shown = [b for b in prompt if b.kind == "image"]
        seen = [f"Picture {i + 1} shows {self.names(b)}." for i, b in enumerate(shown)] if hidden < 0.5 else []
        return " ".join([*seen, *(str(b.data).strip() for b in prompt if b.kind == "text"), "Answer in one or two sentences."])

    def names(self, block: Block) -> str:
        """What the picture and its four quarters show, each once, the surest first."""
        if block.digest in self.seen:
            return self.seen[block.digest]
        picture = open_image(block)
        w, h = picture.size
        boxes = [(0, 0, w, h), *((x, y, x + w // 2, y + h // 2) for x in (0, w // 2) for y in (0, h // 2))]
        with torch.no_grad():
            found = self.eyes(torch.stack([self.prepare(picture.crop(b)) for b in boxes])).softmax(-1)
        sure = [(float(p), int(i)) for part in found for p, i in zip(*part.topk(2), strict=True) if p > 0.15]
        names = list(dict.fromkeys(self.label(i).partition(",")[0] for _, i in sorted(sure, reverse=True)))
        self.seen[block.digest] = ", ".join(names[:4]) or "nothing that has a name"
        return self.seen[block.digest]

    @torch.no_grad()
    def _answer(self, asked: str, seed: int, begun: str, limit: int, temperature: float) -> Answer:
        chat = self.tokens.apply_chat_template([{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True)
        ids = self.tokens(chat + begun, return_tensors="pt").input_ids
        draws, cache, surest, written = torch.rand(limit, generator=torch.Generator().manual_seed(seed)), None, [], []
        for step in range(limit):
            out = self.words(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            surest.append(float(out.logits[0, -1].double().log_softmax(-1).max()))
            token = int(choose(out.logits[:, -1].float(), draws[step : step + 1], temperature, 1.0))
            if token == self.tokens.eos_token_id:
                break
            written.append(token)
            ids = torch.tensor([[token]])
        return Answer(begun + self.tokens.decode(written, skip_special_tokens=True), math.exp(-float(np.mean(surest))))


def looking(path: Path | None = None, device: str = "cpu") -> Looking:
    """As a plugin: --generator benchmarks.photo_pairs:looking=asset:smollm2."""
    return Looking(Path(packaged.resolve(str(path or "asset:smollm2"))))


class Nearness:
    """Both judges: an answer is the better the nearer MiniLM finds it to what a person wrote about the photograph."""

    def __init__(self, questions: Path) -> None:
        self.embed = sentence("asset:minilm")
        rows = pairs(questions, Ledger())
        self.known = {b.digest: str(row.chosen[0].data) for row in rows for b in _images(row.prompt)}

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str], other: str | Sequence[str]) -> list[Any]:
        near = self._near(prompts, answers)
        if isinstance(other, str):
            return [_grade(n, answer, other) for n, answer in zip(near, answers, strict=True)]
        return [_winner(a, b) for a, b in zip(near, self._near(prompts, other), strict=True)]

    def _near(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        truths = [self.known[_images(prompt)[0].digest] for prompt in prompts]
        said, true = (self.embed([text(words or " ") for words in texts]) for texts in (answers, truths))
        return [float(n) for n in (said * true).sum(-1)]


def nearness(path: Path, device: str = "cpu") -> Nearness:
    """As a plugin: --judge benchmarks.photo_pairs:nearness=QUESTIONS."""
    return Nearness(path)


def _images(prompt: Iterable[Block]) -> list[Block]:
    return [replace(b, role=None) for b in prompt if b.kind == "image"]


def _grade(near: float, answer: str, aspect: str) -> float:
    if aspect == HOLDS:
        return float(near > 0.45)
    if aspect == "quality":
        return 100 * near
    return float(min(4, len(answer) // 60) if aspect == "verbosity" else round(4 * min(1.0, max(0.0, near))))


def _winner(first: float, second: float) -> Literal["first", "second"] | None:
    return None if first == second else "first" if first > second else "second"


# ---- the photographs, the command line, and five pairs of each


def write_questions(folder: Path, opencv: Path | None) -> Path:
    """The photographs, at most 640 pixels wide or high, and their answers as LLaVA conversations."""
    import skimage
    import sklearn

    places = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"]
    found = [(next(p / name for p in places if (p / name).exists()), answer) for name, answer in PHOTOS.items()]
    found += [(opencv / name, answer) for name, answer in OPENCV.items()] if opencv else []
    (folder / "photos").mkdir(parents=True)
    rows = []
    for file, answer in found:
        picture = Image.open(file).convert("RGB")
        picture.thumbnail((640, 640))
        picture.save(folder / "photos" / f"{file.stem}.png")
        said = [{"from": "human", "value": f"<image>\n{ASK}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": file.stem, "image": f"photos/{file.stem}.png", "conversations": said})
    questions = folder / "questions.json"
    questions.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return questions


def commands(questions: Path, out: Path) -> dict[str, list[str]]:
    """What `mmpo pairs` is called with, by builder; crop and segments go on from pairs made before."""
    own = "benchmarks.photo_pairs"
    source, model = ["--data", str(questions)], ["--generator", f"{own}:looking=asset:smollm2"]
    judge, near = ["--judge", f"{own}:nearness={questions}"], ["--text-embedder", "sentence=asset:minilm"]
    sampled = [*source, *model, *judge, "temperature=0.9"]
    words = ["duplicate=0.75", "masking=words", "refilling=continue", "similarity=0.9", "neighbours=2", "max_new_tokens=8"]
    biased = ["--data", str(out / "bias_sampling")]
    return {
        "collage": [*source, *model, "select=none", "tile=224", "kinds={sequence: 1, grid: 1, inset: 1}"],
        "retrieval": [*source, *model, *near, "--image-embedder", "efficientnet_lite0", *words],
        "bias_sampling": [*source, *model, *near, "similarity=0.9"],
        "crop": biased,
        "segments": biased,
        "claims": [*sampled, "answers=4", "split=sentences"],
        "annotate": [*sampled, "answers=4", "min_gap=1"],
        "rank_and_sift": [*sampled, "answers=4"],
    }


def told(pair: Pair) -> str:
    """A pair in words."""
    asked = " ".join(f"[{b.path or b.kind}]" if b.kind == "image" else str(b.data).strip() for b in pair.prompt)
    sides = [f"  {side:<8} {' '.join(str(b.data) for b in getattr(pair, side))}" for side in ("chosen", "rejected")]
    spans = [f"  weighs   {side}: " + " | ".join(str(getattr(pair, side)[0].data)[s.start : s.end] for s in found)
             for side, found in pair.spans.items()]  # fmt: skip
    return "\n".join([asked, *sides, *spans, *([f"  scores   {dict(pair.scores)}"] if pair.scores else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--opencv", type=Path)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    questions = given.out / "questions.json"
    questions = questions if questions.exists() else write_questions(given.out, given.opencv)
    for name, words in commands(questions, given.out).items():
        if given.only and name not in given.only:
            continue
        folder = given.out / name
        page = ["--preview", str(given.out / f"{name}.html"), "--plugin", "benchmarks.photo_pairs"]
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "mmpo", "pairs", name, "--out", str(folder), *words, *page], check=True)
        made = list(pairs(folder, Ledger()))
        print(f"\n== {name}: {len(made)} pairs, {time.monotonic() - started:.0f} s")
        print("\n".join(told(pair) for pair in made[:5]), flush=True)


if __name__ == "__main__":
    main()
