"""Re-Align and BDHS with a real, tiny LLaVA as generator, through its own processor, templates and key masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpo import media
from mmpo.datasets.builders.bias_sampling import bias_sampling
from mmpo.datasets.builders.retrieval import prepare, retrieval
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.media_store import MediaStore
from mmpo.datasets.sentences import sentences
from mmpo.datasets.stages import Record, execute
from mmpo.datasets.tools import Generator, Tools
from mmpo.pair import Pair, image, text
from tests.datasets.picture_tools import by_colour, by_words

ANSWER = "A red car is on the road. The man is old."

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llava(family_folder: Callable[[str], Path]) -> Generator:
    from mmpo.modalities.vlm_generate import generator

    return generator(family_folder("llava"))


def asked(id: str, seed: int, answer: str = ANSWER) -> Record:
    from tests.vlm_families import photo

    return Record(id, (image(media.encode(photo(seed))), text("what is it?")), answer)


def biased(llava: Generator, records: list[Record], **options: Any) -> list[Pair]:
    tools = Tools(generator=llava, text_embedder=by_words)
    settings: dict[str, Any] = {"tail_tokens": 8, "max_new_tokens": 8, "flip": 0.0} | options
    done = execute(records, bias_sampling(tools, **settings), seed=0, ledger=Ledger())
    return [r.fields["pair"] for r in done]


def test_a_hidden_picture_does_not_matter_and_a_seen_one_does(llava: Generator) -> None:
    blind = [str(biased(llava, [asked("a", photo)], hide_images=1.0)[0].rejected[0].data) for photo in (0, 1)]
    seeing = [str(biased(llava, [asked("a", photo)], hide_images=0.0)[0].rejected[0].data) for photo in (0, 1)]
    assert blind[0] == blind[1] and seeing[0] != seeing[1]


def test_guided_sentences_begin_as_the_answer_does(llava: Generator) -> None:
    records = [asked(f"r{n}", n, "A red car is on the road") for n in range(6)]  # no stop, which random weights seldom write
    pairs = biased(llava, records)
    assert len(pairs) == 6
    guided = [p for p in pairs if p.meta["guided"]]
    begun = [str(p.rejected[0].data).split(" ")[0] for p in guided]
    assert guided and sum(word == ANSWER.split()[0] for word in begun) >= 2  # unless the cut was before the first word
    assert all(p.rejected != p.chosen and str(p.rejected[0].data) for p in pairs)
    again = biased(llava, records[::-1], batch=2)
    assert {p.id: p.rejected for p in pairs} == {p.id: p.rejected for p in again}


def test_holes_are_filled_from_the_other_picture(llava: Generator, tmp_path: Path) -> None:
    records = [asked(f"r{n}", n) for n in range(4)]
    tools = Tools(generator=llava, image_embedder=by_colour, text_embedder=by_words)
    pool = prepare(records, tools, media=MediaStore(tmp_path, tmp_path), seed=0, duplicate=1.0)
    options: dict[str, Any] = {"masking": "words", "refilling": "continue", "max_new_tokens": 8, "temperature": 1.0}
    done = execute(records, retrieval(tools, pool=pool, **options), seed=0, ledger=Ledger())
    pairs = [r.fields["pair"] for r in done]
    assert len(pairs) >= 2  # where a hole stays empty, which random weights may leave it, there is no pair
    for pair in pairs:
        said = str(pair.rejected[0].data)
        assert said.startswith("A ") and " the " in said and len(sentences(ANSWER)) == 2  # the literals stay in place
        other = pair.branches["chosen@retrieved"].prompt[0]
        assert not np.array_equal(media.pixels(other), media.pixels(pair.prompt[0]))
        assert other.digest == pair.meta["neighbour"]
