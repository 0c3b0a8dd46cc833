"""MIA-DPO: pairs about one of several images, made of data about single images (arXiv 2410.17637).

A question about an image is asked of a sequence of images, of a grid of them, or of the image pasted into another one. The
known answer is chosen and the model's own greedy answer is rejected: where the model was looking elsewhere, which its
attention tells.

Behaviour checked against Liuziyu77/MIA-DPO@a85c51a gen_data. Not as there: noise is clipped where it wrapped around; the asked
image is known instead of being read back from the prompt; labels are in DejaVu Sans; answers of one token, of which the code
has no attention, are dropped. The end of the line after an image belongs to the image, as in all of this suite's formats.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mmpo import media
from mmpo.datasets.answer_filters import edit_distance, holds_box, length_ratio
from mmpo.datasets.attention_ratio import grid_ratio, inset_ratio, sequence_ratio, unseen
from mmpo.datasets.collage_images import GRIDS, Composite, grid, inset, noisy
from mmpo.datasets.media_store import MediaStore
from mmpo.datasets.pairing import pair_id
from mmpo.datasets.sources import Question, about_one_image
from mmpo.datasets.stages import Dropped, Record, Result, Stage, at_least, each
from mmpo.datasets.tools import Answer, Tools
from mmpo.pair import Block, Pair, Role, text

NEEDS: frozenset[str] = frozenset({"generator"})

Kind = Literal["sequence", "grid", "inset"]
KINDS: Mapping[Kind, float] = {"sequence": 1.0, "grid": 1.0, "inset": 1.0}
SEQUENCE_COUNTS = {2: 20000, 3: 6000, 4: 6000, 5: 4410}  # images, and how many of the paper's COCO records had so many
GRID_COUNTS = {2: 18000, 3: 5000, 4: 5000, 6: 4000, 9: 4410}
SEQUENCE_RATIOS = {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6}  # images, and the greatest share of attention that is kept
GRID_RATIOS = {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3}
BEGINNINGS = ("In", "For", "About", "Regarding", "Considering", "Looking at", "With respect to", "Concerning")
NAMES = (
    "the picture in the middle", "the image in the centre", "the image in the middle", "the picture at the centre",
    "the smaller picture in the middle", "the smaller image at the centre", "the inner picture", "the inner image",
    "the picture inside the other one", "the image placed in the middle", "the central image", "the central picture",
)  # fmt: skip
OPENINGS = tuple(f"{beginning} {name}, " for name in NAMES for beginning in BEGINNINGS)


@dataclass(frozen=True)
class Pool:
    """Images to draw from, by sub-set: keys of `media`, (N, 32) bytes each, sorted."""

    media: MediaStore
    keys: Mapping[str, np.ndarray]

    def others(self, subset: str, image: Block, count: int, random: np.random.Generator) -> list[Block]:
        """So many different images of a sub-set, none of them `image`. Raises Dropped where there are not enough."""
        keys = self.keys.get(subset, np.empty((0, 32), np.uint8))
        if len(keys) <= count:
            raise Dropped("too few other images in its sub-set")
        drawn = random.choice(len(keys), count + 1, replace=False)
        asked = replace(image, role=None).digest
        names = [name for name in (keys[i].tobytes().hex() for i in drawn) if name != asked]
        return [self.media.load(name) for name in names[:count]]


def prepare(records: Iterable[Record], tools: Tools, *, media: MediaStore, seed: int, by_folder: bool = True, **_: Any) -> Pool:
    """Every image of a usable record, once per sub-set."""
    found: dict[str, set[bytes]] = {}
    for record in records:
        for block in (b for b in record.prompt if b.kind == "image"):
            found.setdefault(subset(block, by_folder), set()).add(bytes.fromhex(media.keep(block)))
    return Pool(media, {name: _sorted(keys) for name, keys in found.items()})


def _sorted(keys: set[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(sorted(keys)), np.uint8).reshape(-1, 32)


def subset(image: Block, by_folder: bool) -> str:
    """The sub-set an image belongs to: the first folder of its path, as LLaVA's data have one for each source."""
    return (image.path or "").partition("/")[0] if by_folder and "/" in (image.path or "") else ""


def collage(
    tools: Tools,
    *,
    pool: Pool | None = None,
    kinds: Mapping[Kind, float] = KINDS,
    every_kind: bool = False,
    by_folder: bool = True,
    sequence_counts: Mapping[int, float] = SEQUENCE_COUNTS,
    grid_counts: Mapping[int, float] = GRID_COUNTS,
    tile: int = 448,
    margin: int = 40,
    label: int = 36,
    share: float = 0.7,
    reference: str = "In Image{k}, ",
    later: str = "In image{k}, ",
    openings: tuple[str, ...] = OPENINGS,
    grid_noise: float = 225.0,
    inset_noise: float = 49.0,
    max_answer: int = 512,
    max_new_tokens: int = 512,
    select: Literal["attention", "none"] = "attention",
    sequence_ratios: Mapping[int, float] = SEQUENCE_RATIOS,
    grid_ratios: Mapping[int, float] = GRID_RATIOS,
    inset_ratio_below: float = 0.8,
    regions: Literal["boxes", "cells"] = "boxes",
    min_perplexity: float = 1.1,
    max_length_ratio: float | None = None,
    min_edit_distance: float = 0.0,
    batch: int = 8,
) -> list[Stage]:
    """Pairs of MIA-DPO, one a record, or with `every_kind` one of each kind, as in the paper.

    kinds: how often each construction is drawn. by_folder: other images come from the first folder of the image's own path.
    sequence_counts, grid_counts: how often each number of images is drawn. tile, margin, label, share: geometry, see
    mmpo.datasets.collage_images. reference, later: what goes before the first question and those after it; {k} is the
    image's number. openings: what goes before the question about an inset. grid_noise, inset_noise: sigma of the noise on the
    asked cell, or all of an inset, in the picture that the model answers; the pair has the clean one.
    max_answer: records with an answer of so many characters or more are dropped. select: keep what the model was not looking
    at, or everything. sequence_ratios: greatest share of attention by number of images; grid_ratios and inset_ratio_below:
    shares that have to be undercut. regions: whether attention on a grid counts where an image was pasted, or by even cells of
    the canvas; the paper's code cuts all that the model sees evenly, the tokens of its padding included. min_perplexity:
    answers more certain than that are dropped. max_length_ratio, min_edit_distance: of the two answers, see
    mmpo.datasets.answer_filters; off by default, the paper gives no numbers.
    """
    _checked(kinds, sequence_counts, grid_counts, sequence_ratios, grid_ratios, select)
    _checked_words(reference=(reference,), later=(later,), openings=openings)
    at_least(tile=(tile, 1), margin=(margin, 0), label=(label, 0), max_new_tokens=(max_new_tokens, 1))
    at_least(grid_noise=(grid_noise, 0), inset_noise=(inset_noise, 0))
    if not 0 < share < 1:
        raise ValueError(f"share: expected a share of the outer picture between 0 and 1, found {share}")
    if pool is None:
        raise ValueError("collage: expected a pool of images; make one with mmpo.datasets.builders.collage.prepare")
    drawn = {"sequence": sequence_counts, "grid": grid_counts, "inset": {2: 1.0}}
    plan = functools.partial(_plan, kinds=kinds, every_kind=every_kind, counts=drawn, max_answer=max_answer)
    geometry = {"tile": tile, "margin": margin, "label": label, "share": share}
    words = {"reference": reference, "later": later, "openings": openings}
    noise = {"grid": grid_noise, "inset": inset_noise}
    compose = functools.partial(_compose, pool=pool, by_folder=by_folder, geometry=geometry, words=words, noise=noise)
    limits = _Limits(sequence_ratios, grid_ratios, inset_ratio_below, min_perplexity, max_length_ratio, min_edit_distance)
    attention = select == "attention"
    keep = functools.partial(_keep, limits=limits, attention=attention)
    answer = functools.partial(_answer, tools=tools, max_new_tokens=max_new_tokens, attention=attention, regions=regions)
    before = [each("plan", plan), each("compose", compose), Stage("answer", batch, answer)]
    return [*before, each("select", keep), each("pair", _pair)]


def _checked(
    kinds: Mapping[Any, float], sequences: Mapping[int, float], grids: Mapping[int, float],
    sequence_ratios: Mapping[int, float], grid_ratios: Mapping[int, float], select: str,
) -> None:  # fmt: skip
    """Raises ValueError for what cannot be drawn, laid out or selected."""
    for name, weights in (("kinds", kinds), ("sequence_counts", sequences), ("grid_counts", grids)):
        if not weights or any(w < 0 for w in weights.values()) or not sum(weights.values()):
            raise ValueError(f"{name}: expected weights >= 0, one of them above, found {dict(weights)}")
    if unknown := set(grids) - set(GRIDS):
        raise ValueError(f"grid_counts: expected numbers of images out of {', '.join(map(str, GRIDS))}, found {min(unknown)}")
    if min(sequences) < 2:
        raise ValueError(f"sequence_counts: expected at least 2 images, found {min(sequences)}")
    for name, counts, ratios in (("sequence", sequences, sequence_ratios), ("grid", grids, grid_ratios)):
        if select == "attention" and (missing := set(counts) - set(ratios)):
            raise ValueError(f"{name}_ratios: expected one for {min(missing)} images, as {name}_counts has them, found none")


def _checked_words(**given: Sequence[str]) -> None:
    """Raises ValueError for openings that do not name an image by its number alone, and for none."""
    for name, openings in given.items():
        if not openings:
            raise ValueError(f"{name}: expected at least one, found none")
        for opening in openings:
            try:
                opening.format(k=1)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(f"{name}: expected text in which {{k}} is the image's number, found {opening!r}") from error


def _plan(
    record: Record, random: np.random.Generator, *, kinds: Mapping[Kind, float], every_kind: bool,
    counts: Mapping[str, Mapping[int, float]], max_answer: int,
) -> list[Record]:  # fmt: skip
    """What is made of a record: kind and number of images."""
    about_one_image(record)
    answer = (record.answer or "").strip()
    if not answer:
        raise Dropped("no known answer")
    if len(answer) >= max_answer:
        raise Dropped("answer too long")
    wanted = [kind for kind, weight in kinds.items() if weight > 0] if every_kind else [_drawn(kinds, random)]
    planned = [record.having(origin=record.id, kind=kind, count=_drawn(counts[kind], random)) for kind in wanted]
    if not every_kind:
        return planned
    return [Record(f"{record.id}/{p.fields['kind']}", p.prompt, p.answer, p.fields, p.provenance) for p in planned]


def _drawn(weights: Mapping[Any, float], random: np.random.Generator) -> Any:
    shares = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(shares, random.random() * shares[-1], side="right"))]


def _compose(
    record: Record, random: np.random.Generator, *, pool: Pool, by_folder: bool, geometry: Mapping[str, Any],
    words: Mapping[str, Any], noise: Mapping[str, float],
) -> Record:  # fmt: skip
    """The new prompt, the prompt that the model answers, and what was pasted where."""
    question = about_one_image(record)
    kind, count = record.fields["kind"], record.fields["count"]
    if kind != "sequence":  # where a box means nothing once the image has moved
        if holds_box(str(record.answer)):
            raise Dropped("answer with a bounding box")
        if any(holds_box(str(turn.data)) for turn in question.turns):
            raise Dropped("question with a bounding box")
    images = pool.others(subset(question.image, by_folder), question.image, count - 1, random)
    target = 1 if kind == "inset" else int(random.integers(count))
    images.insert(target, question.image)
    told = {"kind": kind, "images": [block.path or block.digest for block in images], "target": target + 1}
    opening = str(words["openings"][int(random.integers(len(words["openings"])))]) if kind == "inset" else words["reference"]
    turns = _turns(question, opening, "" if kind == "inset" else words["later"], target + 1)
    if kind == "sequence":
        places = [{"image": k, "label": f"Image{k + 1}", "target": k == target} for k in range(count)]
        return record.having(told, asked=_sequence(question, images, turns), made=told | {"regions": places})
    made = _composite(kind, images, geometry)
    told |= {"size": list(made.picture.size), "regions": _regions(made, kind, target), "cells": list(map(list, made.cells))}
    spoilt = noisy(made.picture, made.cells[target if kind == "grid" else 0], noise[kind], random)
    clean, noised = (Block("image", data, None, turns[0].role) for data in (_encoded(made), spoilt))
    asked, answered = ((*question.before, block, *turns) for block in (clean, noised))
    return record.having(told, asked=asked, answered=answered, made=told)


def _turns(question: Question, opening: str, later: str, number: int) -> tuple[Block, ...]:
    """The turns of a question with the words that say which image is meant; the first letter after them is a small one."""
    first, *rest = question.turns
    asked = question.text.lstrip()
    turns = [replace(first, data=opening.format(k=number) + asked[:1].lower() + asked[1:])]
    return (*turns, *(replace(b, data=later.format(k=number) + str(b.data)) if b.role == "user" else b for b in rest))


def _sequence(question: Question, images: Sequence[Block], turns: Sequence[Block]) -> tuple[Block, ...]:
    """Each image after its name, then the question. The lines of the paper end after an image, which here belongs to it."""
    role, blocks = turns[0].role, list(question.before)
    for k, block in enumerate(images):
        blocks += [text(f"Image{k + 1}:", role), replace(block, role=role)]
    return (*blocks, *turns)


def _composite(kind: Kind, images: Sequence[Block], geometry: Mapping[str, Any]) -> Composite:
    pictures = [media.open_image(block) for block in images]
    if kind == "inset":
        return inset(*pictures, share=geometry["share"])
    return grid(pictures, **{name: geometry[name] for name in ("tile", "margin", "label")})


def _regions(made: Composite, kind: Kind, target: int) -> list[dict[str, Any]]:
    """Where each image is in the composite, in pixels; of an inset, the inner one."""
    names = ["inner"] if kind == "inset" else [f"Image{k + 1}" for k in range(len(made.boxes))]
    asked = 0 if kind == "inset" else target
    return [
        {"image": 0, "label": name, "box": list(box), "target": k == asked}
        for k, (name, box) in enumerate(zip(names, made.boxes, strict=True))
    ]


def _encoded(made: Composite) -> bytes:
    """PNG, so that every pasted pixel is there again; at the fastest level, which is hardly larger for photos."""
    return media.encode(np.asarray(made.picture), compress_level=1)


def _answer(
    records: Sequence[Record], randoms: Sequence[np.random.Generator], *, tools: Tools, max_new_tokens: int,
    attention: bool, regions: str,
) -> list[Result]:  # fmt: skip
    """The model's own greedy answers, where there is noise to the noisy picture."""
    assert tools.generator is not None  # NEEDS
    prompts = [record.fields.get("answered", record.fields["asked"]) for record in records]
    seeds = [int(random.integers(2**31)) for random in randoms]
    answers = tools.generator(prompts, seeds, max_new_tokens=max_new_tokens, temperature=0.0, attention=attention)
    return [_answered(record, answer, attention, regions) for record, answer in zip(records, answers, strict=True)]


@dataclass(frozen=True)
class _Limits:
    sequence: Mapping[int, float]
    grid: Mapping[int, float]
    inset: float
    perplexity: float
    length_ratio: float | None
    edit_distance: float


def _answered(record: Record, answer: Answer, attention: bool, regions: str) -> Result:
    """The record with the model's answer, and the share of attention on the asked image where that is looked at."""
    told: dict[str, Any] = {"perplexity": answer.perplexity}
    if attention:
        try:
            told["ratio"] = _ratio(record.fields["made"], answer, regions)
        except LookupError as missing:
            return Dropped(str(missing.args[0]))
    return record.having(told, answer=answer.text, **told)


def _ratio(made: Mapping[str, Any], answer: Answer, regions: str) -> float:
    """Attention on the asked image over that on all. Raises LookupError where the generator gave none that says so.

    So it does for a grid of which a processor cut a whole panel off, as that of LLaVA-1.5 does without `pad_to_square`.
    """
    if made["kind"] == "sequence":
        if answer.image_mass is None:
            raise LookupError("no attention: answer of one token")
        return sequence_ratio(answer.image_mass, made["target"] - 1, answer.image_tokens)
    if answer.region_mass is None:
        raise LookupError("no attention map of the image")
    if made["kind"] == "inset":
        return inset_ratio(answer.region_mass)
    boxes = [region["box"] for region in made["regions"]] if regions == "boxes" else made["cells"]
    if unseen(answer.region_mass, boxes, made["size"]):  # it could be chosen or left out by nothing but its place
        raise LookupError("a panel that the model does not see")
    return grid_ratio(answer.region_mass, boxes, made["size"], made["target"] - 1)


def _keep(record: Record, random: np.random.Generator, *, limits: _Limits, attention: bool) -> Record:
    """Raises Dropped for pairs that teach nothing, those of an answer that the model was sure of, and by attention."""
    said, known = str(record.fields["answer"]), str(record.answer)
    if not said.strip():
        raise Dropped("empty answer")
    if said.strip() == known.strip():
        raise Dropped("equal to the known answer")
    if attention and not _elsewhere(record, limits):
        raise Dropped("model was looking at the asked image")
    perplexity = record.fields["perplexity"]
    if limits.perplexity > 1 and perplexity is None:
        raise ValueError("collage: the generator tells no perplexity; min_perplexity=0 does without")
    if perplexity is not None and perplexity <= limits.perplexity:
        raise Dropped("answer too certain")
    if limits.length_ratio is not None and length_ratio(said, known) > limits.length_ratio:
        raise Dropped("lengths too different")
    if limits.edit_distance and edit_distance(said, known) < limits.edit_distance:
        raise Dropped("answers too similar")
    return record


def _elsewhere(record: Record, limits: _Limits) -> bool:
    kind, count, ratio = (record.fields[name] for name in ("kind", "count", "ratio"))
    if kind == "sequence":
        return bool(ratio <= limits.sequence[count])
    return bool(ratio < (limits.grid[count] if kind == "grid" else limits.inset))


def _pair(record: Record, random: np.random.Generator) -> Record:
    """The pair of the clean prompt; all pairs of one source record are one group, so that no split divides them."""
    prompt = record.fields["asked"]
    role: Role | None = "assistant" if any(block.role for block in prompt) else None
    chosen, rejected = ((text(str(words).strip(), role),) for words in (record.answer, record.fields["answer"]))
    told = {name: record.fields[name] for name in ("ratio", "perplexity") if record.fields.get(name) is not None}
    made = {name: record.fields["made"][name] for name in ("kind", "target", "images", "regions")}
    meta = {"source": record.fields["origin"], **made, **told}
    name = pair_id(prompt, chosen, rejected)
    return record.having(pair=Pair(name, prompt, chosen, rejected, group=record.fields["origin"], meta=meta))
