"""Re-Align (arXiv 2502.13146): the answer's facts masked and filled again while looking at a similar, other picture.

The pair's rejected answer is what the model says of the neighbour, and the neighbour itself makes a third branch,
`chosen@retrieved`: the chosen answer beneath the wrong picture. Its objective (rDPO) is two terms,
`[{loss: dpo}, {loss: dpo, of: [chosen, "chosen@retrieved"]}]`.

The paper says in its text that a candidate is taken when its similarity is below the threshold, and in its Algorithm 1 the
opposite; this is the text's, which alone makes hard negatives. Its k is not stated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mmpo.datasets.masks import MASK, content_segments, fill, masked, segments_of
from mmpo.datasets.media_store import MediaStore
from mmpo.datasets.sampling import answer_of
from mmpo.datasets.sources import about_one_image
from mmpo.datasets.stages import Dropped, Record, Result, Stage, at_least, each
from mmpo.datasets.tools import Embedder, Generator, Prompt, Tools
from mmpo.datasets.vectors import Index, cosines
from mmpo.errors import DataError
from mmpo.pair import Block, Branch, Pair, text

NEEDS: frozenset[str] = frozenset({"generator", "image_embedder", "text_embedder"})

ASK_TO_MASK = (
    "Below is an answer to a question about the picture. Replace every word or phrase in it that tells of an object, an "
    f"attribute or a relation in the picture by {MASK}. Change nothing else, and write only the answer.\n"
    "Question: {question}\nAnswer: {answer}"
)
ASK_TO_FILL = (
    f"Below is an answer to a question about the picture, with some words replaced by {MASK}. Fill in each {MASK} with what "
    "the picture shows. Change nothing else, and write only the answer.\nQuestion: {question}\nAnswer: {answer}"
)


@dataclass(frozen=True)
class Neighbourhood:
    """Of each image of the source, the keys of those most similar, best first, and their cosines."""

    media: MediaStore
    near: dict[str, tuple[tuple[str, float], ...]]


def prepare(
    records: Iterable[Record],
    tools: Tools,
    *,
    media: MediaStore,
    seed: int,
    neighbours: int = 5,
    duplicate: float = 0.95,
    batch: int = 16,
    **_: Any,
) -> Neighbourhood:
    """Embed every distinct image once, and look up its neighbours: not itself, and no image with cosine >= `duplicate`."""
    embedder = tools.image_embedder
    if embedder is None:
        raise ValueError("retrieval: expected an image_embedder")
    keys: list[str] = []
    vectors: list[np.ndarray] = []
    for blocks in _batched(_distinct_images(records), batch):
        for block, vector in _vectors(embedder, blocks):
            keys.append(media.keep(block))
            vectors.append(vector)
    return Neighbourhood(media, _neighbours(keys, np.stack(vectors), neighbours, duplicate) if vectors else {})


def _distinct_images(records: Iterable[Record]) -> Iterator[Block]:
    """The images of all prompts, each once."""
    seen: set[str] = set()
    for record in records:
        for block in record.prompt:
            image = replace(block, role=None)  # whoever says it, it is one image
            if image.kind == "image" and image.digest not in seen:
                seen.add(image.digest)
                yield image


def _batched(blocks: Iterator[Block], size: int) -> Iterator[list[Block]]:
    while some := list(itertools.islice(blocks, size)):
        yield some


def _vectors(embedder: Embedder, blocks: list[Block]) -> list[tuple[Block, np.ndarray]]:
    """Each image with its vector, without those that do not open; their records are dropped when they come by."""
    try:
        return list(zip(blocks, embedder(blocks), strict=True))
    except DataError:
        return [] if len(blocks) == 1 else [pair for block in blocks for pair in _vectors(embedder, [block])]


def _neighbours(
    keys: list[str], vectors: np.ndarray, wanted: int, duplicate: float
) -> dict[str, tuple[tuple[str, float], ...]]:
    """The `wanted` nearest of every image that are below `duplicate`; as many as there are in a small pool."""
    index, found = Index(vectors), {}
    asked, missing = min(len(keys), 2 * wanted + 1), np.arange(len(keys))
    while len(missing):
        scores, rows = index.nearest(vectors[missing], asked)
        short = []
        for of, cosine, row in zip(missing, scores, rows, strict=True):
            other = [(keys[r], float(c)) for c, r in zip(cosine, row, strict=True) if r != of and c < duplicate]
            found[keys[of]] = tuple(other[:wanted])
            if len(other) < wanted and asked < len(keys):
                short.append(of)
        missing, asked = np.array(short, dtype=int), min(len(keys), 4 * asked)
    return found


def retrieval(
    tools: Tools,
    *,
    pool: Neighbourhood,
    neighbours: int = 5,
    duplicate: float = 0.95,
    masking: Literal["model", "words"] = "model",
    share: float = 1.0,
    refilling: Literal["request", "continue"] = "request",
    similarity: float = 0.95,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    batch: int = 16,
) -> list[Stage]:
    """Stages of Re-Align. A record needs one image in its prompt and an answer.

    neighbours: how many pictures are tried, in order of similarity. duplicate: cosine from which another picture counts as
    the same one; it depends on the embedder, and this is meant for CLIP. masking: by the generator, whose result is dropped
    when it changed more than it masked, or by a list of English function words, of whose complement `share` is masked.
    refilling: the generator is asked for the whole answer, or it continues the answer at each mask in turn, which models
    that follow no instructions can do as well. similarity: a candidate with a text cosine at or above is too alike.
    temperature, max_new_tokens: of every generation.
    """
    at_least(neighbours=(neighbours, 1), max_new_tokens=(max_new_tokens, 1), temperature=(temperature, 0))
    if not 0 < share <= 1:
        raise ValueError(f"retrieval.share: expected a share in (0, 1], got {share}")
    if share < 1 and masking == "model":
        raise ValueError(f"retrieval.share: {share} is of the words that masking=words would mask; the model masks as it will")
    if tools.generator is None or tools.text_embedder is None:
        raise ValueError("retrieval: expected a generator, an image_embedder and a text_embedder")
    say = _Speaker(tools.generator, tools.text_embedder, temperature, max_new_tokens)
    by_words = each("mask", lambda record, random: _masked_by_words(record, share, random))
    by_model = Stage("mask", batch, lambda records, randoms: _masked_by_model(records, randoms, say))
    return [
        each("retrieve", lambda record, random: _retrieved(record, pool)),
        by_words if masking == "words" else by_model,
        Stage("refill", batch, lambda records, randoms: _refilled(records, randoms, say, pool.media, refilling, similarity)),
        each("pair", _pair),
    ]


@dataclass(frozen=True)
class _Speaker:
    """The generator with its settings, and the embedder that compares what it says."""

    generator: Generator
    embedder: Embedder
    temperature: float
    max_new_tokens: int

    def __call__(self, prompts: Sequence[Prompt], seeds: Sequence[int], prefixes: Sequence[str] | None = None) -> list[str]:
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        said = self.generator(prompts, seeds, prefixes=prefixes, **settings) if prompts else []
        return [answer.text for answer in said]

    def cosines(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        return cosines(self.embedder, [text(t) for t in first], [text(t) for t in second])


def _retrieved(record: Record, pool: Neighbourhood) -> Record:
    question = about_one_image(record)
    if not record.answer or not record.answer.strip():
        raise Dropped("no answer")
    near = pool.near.get(replace(question.image, role=None).digest)
    if near is None:
        raise Dropped("unreadable media")
    if not near:
        raise Dropped("no neighbour that is not a duplicate")
    told = {"cosines": [round(cosine, 4) for _, cosine in near]}
    return replace(record, answer=record.answer.strip()).having(told, near=[list(n) for n in near])


def _seeds(randoms: Sequence[np.random.Generator]) -> list[int]:
    return [int(random.integers(2**31)) for random in randoms]


def _masked_by_words(record: Record, share: float, random: np.random.Generator) -> Record:
    segments = content_segments(str(record.answer), share, random)
    if not segments:
        raise Dropped("nothing to mask")
    return _with_holes(record, masked(str(record.answer), segments), segments)


def _masked_by_model(records: Sequence[Record], randoms: Sequence[np.random.Generator], say: _Speaker) -> list[Result]:
    asked = [(about_one_image(record), record.answer) for record in records]
    prompts = [(q.image, text(ASK_TO_MASK.format(question=q.last, answer=answer))) for q, answer in asked]
    results: list[Result] = []
    for record, said in zip(records, say(prompts, _seeds(randoms)), strict=True):
        template = said.strip()
        segments = segments_of(template, str(record.answer))
        if segments is None:
            results.append(Dropped("masking changed the answer" if MASK in template else "nothing was masked"))
        else:
            results.append(_with_holes(record, template, segments))
    return results


def _with_holes(record: Record, template: str, segments: list[tuple[int, int]]) -> Record:
    return record.having({"masked": template}, masked=template, segments=[list(s) for s in segments])


def _refilled(
    records: Sequence[Record],
    randoms: Sequence[np.random.Generator],
    say: _Speaker,
    media: MediaStore,
    refilling: str,
    similarity: float,
) -> list[Result]:
    """The first neighbour of each record whose answer is different enough; all open records are asked in one call."""
    results: dict[int, Result] = {}
    tried: dict[int, list[float]] = {at: [] for at in range(len(records))}
    for turn in range(max(len(record.fields["near"]) for record in records)):
        ask = [at for at in tried if at not in results and turn < len(records[at].fields["near"])]
        if not ask:
            break
        near = [records[at].fields["near"][turn] for at in ask]
        pictures = [media.load(key) for key, _ in near]
        fillers = _whole_answers if refilling == "request" else _hole_by_hole
        said = fillers([records[at] for at in ask], pictures, _seeds([randoms[at] for at in ask]), say)
        alike = say.cosines([str(records[at].answer) for at in ask], said)
        for at, (_, cosine), picture, answer, cos in zip(ask, near, pictures, said, alike, strict=True):
            tried[at].append(round(float(cos), 4))
            if answer and MASK not in answer and answer != records[at].answer and cos < similarity:
                told = {"neighbour": picture.digest, "rank": turn + 1, "cosine": round(cosine, 4), "text_cosines": tried[at]}
                results[at] = records[at].having(told, rejected=answer, neighbour=picture, told=told)
    return [results.get(at, Dropped("no neighbour gave a different answer")) for at in tried]


def _whole_answers(records: Sequence[Record], pictures: Sequence[Block], seeds: Sequence[int], say: _Speaker) -> list[str]:
    asked = [ASK_TO_FILL.format(question=about_one_image(r).last, answer=r.fields["masked"]) for r in records]
    return [said.strip() for said in say([(p, text(words)) for p, words in zip(pictures, asked, strict=True)], seeds)]


def _hole_by_hole(records: Sequence[Record], pictures: Sequence[Block], seeds: Sequence[int], say: _Speaker) -> list[str]:
    """Each hole continued from what stands before it, holes filled already included; one call per hole for all records.

    A prefix ends with a word: white space before the hole is the model's to write, in whose tokens it belongs to the next word.
    Where the model had nothing to say, the mask stays, and with it the candidate is none.
    """
    prompts = [_with_image(record.prompt, picture) for record, picture in zip(records, pictures, strict=True)]
    literals = [str(r.fields["masked"]).split(MASK) for r in records]
    written = [pieces[0] for pieces in literals]
    for hole in range(max(len(r.fields["segments"]) for r in records)):
        ask = [at for at, r in enumerate(records) if hole < len(r.fields["segments"])]
        prefixes = [written[at].rstrip() for at in ask]
        said = say([prompts[at] for at in ask], [seeds[at] for at in ask], prefixes)
        for at, prefix, answer in zip(ask, prefixes, said, strict=True):
            start, end = records[at].fields["segments"][hole]
            words = len(str(records[at].answer)[start:end].split())
            written[at] += (fill(answer[len(prefix) :], literals[at][hole + 1], words) or MASK) + literals[at][hole + 1]
    return [answer.strip() for answer in written]


def _with_image(prompt: Prompt, picture: Block) -> Prompt:
    """The prompt with another picture where its own stood, said by the same role."""
    return tuple(replace(picture, role=b.role) if b.kind == "image" else b for b in prompt)


def _pair(record: Record, random: np.random.Generator) -> Record:
    chosen, rejected = (answer_of(record.prompt, str(t)) for t in (record.answer, record.fields["rejected"]))
    condition = _with_image(record.prompt, record.fields["neighbour"])
    branches = {"chosen@retrieved": Branch(condition, chosen)}
    pair = Pair(record.id, record.prompt, chosen, rejected, branches=branches, meta=dict(record.fields["told"]))
    return record.having(pair=pair)
