"""What is shown and voted on: answers to the same prompts, by system, from a run, folders of files, or a dataset.

Whatever the source, each file is opened once through `mmpo.media` when the pool is read: links that leave the folder, devices,
SVG, bombs and damaged files are refused and counted with their reason. Files stay on the disk, and are refused later on when
they are no longer what they were. Imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from mmpo import media
from mmpo.datasets.fields import checked_text, shown, whole_field
from mmpo.datasets.ledger import BadField, Ledger, Row
from mmpo.datasets.load import detect, holds_candidates, load_candidates
from mmpo.datasets.tables import rows_of
from mmpo.errors import DataError
from mmpo.pair import Block, Kind, Role, text
from mmpo.runfolder import of_sample

Mode = Literal["vote", "label"]
Prompt = tuple[Block, ...]
Prompts = Mapping[str, tuple[Prompt, int | None]]  # of items, by stem or file name, each with its seed

KINDS: dict[str, Kind] = {
    ".txt": "text",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".mp4", ".webm"), "video"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg"), "audio"),
}  # type: ignore[dict-item]
SIDES = ("base", "aligned")  # the systems of a run, in the order in which its win rate is told
PROMPTS = ("prompts.jsonl", "prompts.csv")
OWN = "votes"  # the folder beside the samples that votes are kept in
MAX_TEXT = 2**20  # bytes of a file of text
MAX_NOTES = 64 * 2**20  # bytes of the files that samples are told about in


@dataclass(frozen=True)
class Stored:
    """A file under `root` with the content that was checked."""

    root: Path
    name: str
    kind: Kind
    sha256: str

    def read(self) -> Block:
        """The block. Raises DataError when the file is gone, or another one by now."""
        data = media.read(self.root, self.name, media.LIMITS.size, self.sha256)
        return Block(self.kind, data.decode() if self.kind == "text" else data, self.name)


@dataclass(frozen=True)
class Entry:
    """One answer. id: of item, system and content; item: what answers are compared on; seed: None where nobody noted it.

    system: who answered, "" where the data do not say. digest: of the block, as `Block.digest`.
    """

    id: str
    item: str
    system: str
    prompt: Prompt
    seed: int | None
    kind: Kind
    digest: str
    source: Block | Stored

    @property
    def block(self) -> Block:
        """The answer itself, read again where it is a file."""
        return self.source if isinstance(self.source, Block) else self.source.read()


@dataclass(frozen=True)
class Pool:
    """source: where it was read from, with links followed. ledger: what became of every file or row there."""

    source: Path
    entries: tuple[Entry, ...]
    ledger: Ledger = field(default_factory=lambda: Ledger("skip"))

    @property
    def title(self) -> str:
        """A name for people. It is shown where systems are named."""
        return self.source.name

    @cached_property
    def items(self) -> dict[str, list[Entry]]:
        """The answers of each item, in the order of the source."""
        found: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            found[entry.item].append(entry)
        return dict(found)

    @cached_property
    def by_id(self) -> dict[str, Entry]:
        return {entry.id: entry for entry in self.entries}

    @cached_property
    def systems(self) -> list[str]:
        """The systems that are named, in the order of first appearance."""
        return [name for name in dict.fromkeys(entry.system for entry in self.entries) if name]

    @cached_property
    def matchups(self) -> list[tuple[Entry, Entry]]:
        """Every two answers of an item that are not the same."""
        couples = (itertools.combinations(entries, 2) for entries in self.items.values())
        return [(a, b) for a, b in itertools.chain.from_iterable(couples) if a.digest != b.digest]

    def asked(self, mode: Mode) -> list[tuple[Entry, Entry]]:
        """The matchups that are voted on: in mode "vote" none of a system with itself, which would say nothing of systems."""
        return [(a, b) for a, b in self.matchups if mode == "label" or not a.system or a.system != b.system]


def open_pool(source: Path, mode: Mode = "vote") -> Pool:
    """Read what people are to compare.

    source: a run (its samples/); a folder with base.jsonl and aligned.jsonl; a folder with one folder a system, in which the
    same file stem is the same item; a dataset of candidates; in mode "label" also a folder of files, which are ranked against
    each other, by prompt where a file of prompts names them. prompts.jsonl or prompts.csv beside the files: item (stem or
    file name), prompt, and where it is known seed. Raises DataError when that leaves nothing to compare.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, found {mode!r}")
    source = source.resolve()  # answers are read again when they are shown, and a server has a working directory of its own
    ledger = Ledger("skip")
    entries = tidied(_entries(source, mode, ledger), ledger)
    pool = Pool(source, tuple(entries), ledger)
    if not (asked := pool.asked(mode)):
        more = " by different systems; `mmpo demo label` compares answers of one system" if pool.matchups else ""
        raise DataError(f"{source}: no two different answers to the same item{more}\n{ledger}")
    if own := len(pool.matchups) - len(asked):
        ledger.notes["comparisons of two answers of one system (not asked)"] += own
    if same := sum(len(e) * (len(e) - 1) // 2 for e in pool.items.values()) - len(pool.matchups):
        ledger.notes["comparisons of two equal answers (not asked)"] += same
    return pool


def default_folder(source: Path) -> Path:
    """Where the votes on a source are kept: votes/ inside a folder, a folder beside a file, or beside tables in a folder."""
    source = source.resolve()
    return source / OWN if source.is_dir() and not _holds_tables(source) else source.with_name(f"{source.name}.{OWN}")


def _holds_tables(folder: Path) -> bool:
    """Whether a folder is a dataset of parquet files; those that were exported into its votes are not meant."""
    return any(path.relative_to(folder).parts[0] != OWN for path in folder.rglob("*.parquet"))


def _entries(source: Path, mode: Mode, ledger: Ledger) -> list[Entry]:
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_dir() and (source / "recipe.yaml").is_file() and not (source / "samples").is_dir():
        raise DataError(f"{source}: no samples/; the run has not come to its end, or had no judge: start its command again")
    if (source / "samples").is_dir():
        return run_entries(source, ledger)
    if source.is_dir() and all((source / f"{side}.jsonl").is_file() for side in SIDES):
        return told_entries(source, [], ledger)
    if source.is_file() or _holds_tables(source):
        return dataset_entries(source, ledger)
    folders = sorted(p.name for p in source.iterdir() if p.is_dir() and p.name != OWN and not p.name.startswith("."))
    if folders:
        folders.sort(key=lambda name: SIDES.index(name) if name in SIDES else len(SIDES))
        return folder_entries(source, folders, prompts_of(source, ledger), ledger)
    if mode == "vote":
        raise DataError(f"{source}: expected one folder for each system; `mmpo demo label` ranks the files of a single one")
    return flat_entries(source, prompts_of(source, ledger), ledger)


def tidied(entries: Iterable[Entry], ledger: Ledger) -> list[Entry]:
    """Entries with others to compare them with: of items with one answer, or of several kinds, none is left."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.item].append(entry)
    kept: dict[str, Entry] = {}
    for group in found.values():
        distinct = {entry.id: entry for entry in group}
        if len(distinct) < len(group):
            ledger.notes["repeated answers of one system (left out)"] += len(group) - len(distinct)
        if len(distinct) < 2:
            ledger.notes["answers without another to the same item (left out)"] += len(distinct)
        elif len({entry.kind for entry in group}) > 1:
            ledger.notes["answers to an item whose answers are of different kinds (left out)"] += len(distinct)
        else:
            kept |= distinct
    return list(kept.values())


def entry_of(item: str, system: str, prompt: Prompt, block: Block, seed: int | None, source: Stored | None = None) -> Entry:
    """An entry with its id. source: where the block can be read again, so that it need not stay in memory."""
    name = "\0".join((item, system, block.digest, *(b.digest for b in prompt)))
    made = hashlib.sha256(name.encode()).hexdigest()[:20]
    return Entry(made, item, system, prompt, seed, block.kind, block.digest, source or block)


# Runs


def run_entries(run: Path, ledger: Ledger) -> list[Entry]:
    """The samples of a run: base and aligned on the same prompts and seeds.

    One that summary.json says nothing of has its name as its prompt, and no seed.
    """
    summary = _summary(run)
    samples, seeds = run / "samples", _listed(summary.get("seeds"))
    if (samples / "base.jsonl").is_file():
        return told_entries(samples, seeds, ledger)
    present = [side for side in SIDES if (samples / side).is_dir()]
    stems = sorted({PurePosixPath(name).stem for side in present for name in _names(samples, side)})
    captions = {stem: of_sample(summary.get("prompts") or [], stem) for stem in stems}
    prompts = {stem: ((text(stem if said is None else str(said)),), of_sample(seeds, stem)) for stem, said in captions.items()}
    return folder_entries(samples, present, prompts, ledger)


def _summary(run: Path) -> Mapping[str, Any]:
    if not (run / "summary.json").is_file():
        return {}
    try:
        found = json.loads(media.read(run, "summary.json", MAX_NOTES))
    except ValueError as error:
        raise DataError(f"{run / 'summary.json'}: not readable JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _listed(seeds: Any) -> list[int]:
    return seeds if isinstance(seeds, list) and all(type(seed) is int and abs(seed) < 2**63 for seed in seeds) else []


def told_entries(folder: Path, seeds: Sequence[int], ledger: Ledger) -> list[Entry]:
    """Answers of base.jsonl and aligned.jsonl, line by line: prompt, text, and turns and pictures where a prompt has them."""
    found: list[Entry] = []
    for side in SIDES:
        for i, (where, row) in enumerate(rows_of(folder / f"{side}.jsonl")):
            with _counted(f"{side}/{where}", ledger):
                if isinstance(row, BadField):
                    raise row
                prompt = _asked(folder, row)
                item = f"{i:05d}-{hashlib.sha256(''.join(b.digest for b in prompt).encode()).hexdigest()[:8]}"
                block = Block("text", checked_text(row.get("text"), "text"), role=_answer_role(prompt))
                found.append(entry_of(item, side, prompt, block, seeds[i] if i < len(seeds) else None))
    return found


def _asked(folder: Path, row: Row) -> Prompt:
    """The prompt of a line: its turns, or where it has none the words and then the pictures."""
    turns = row.get("turns")
    if isinstance(turns, list):
        return tuple(_turn(folder, turn) for turn in turns)
    names = row.get("pictures") if isinstance(row.get("pictures"), list) else []
    return (text(checked_text(row.get("prompt"), "prompt")), *(_picture(folder, name, None) for name in names or []))


def _turn(folder: Path, turn: Any) -> Block:
    role: Any = turn.get("role") if isinstance(turn, dict) else "no object"
    if role not in (None, *get_args(Role)):
        raise BadField("turns", "objects with role, and text or picture", shown(turn), "bad turns")
    return _picture(folder, turn["picture"], role) if "picture" in turn else text(checked_text(turn.get("text"), "turns"), role)


def _picture(folder: Path, name: Any, role: Role | None) -> Block:
    own = isinstance(name, str) and PurePosixPath(name).name == name
    if not own:
        raise BadField("pictures", "names of files of pictures/", shown(name), "forbidden path")
    block = Block("image", media.read(folder, f"pictures/{name}"), name, role)
    media.open_image(block)
    return block


def _answer_role(prompt: Prompt) -> Role | None:
    return "assistant" if any(block.role for block in prompt) else None


# Folders


def folder_entries(root: Path, systems: Sequence[str], prompts: Prompts | None, ledger: Ledger) -> list[Entry]:
    """One folder a system; the same stem is the same item, whose prompt is the stem where there is no file of prompts."""
    found = []
    for system in systems:
        for name in _names(root, system):
            with _counted(name, ledger):
                path = PurePosixPath(name)
                block, stored = opened(root, name)
                prompt, seed = ((text(path.stem),), None) if prompts is None else _known(path.name, prompts)
                found.append(entry_of(path.stem, checked_text(system, "file name"), prompt, block, seed, stored))
    return found


def flat_entries(root: Path, prompts: Prompts | None, ledger: Ledger) -> list[Entry]:
    """The files of one folder, each a system of its own: ranked by prompt, or in one group without a file of prompts."""
    found = []
    for name in _names(root, ""):
        with _counted(name, ledger):
            block, stored = opened(root, name)
            prompt, seed = ((), None) if prompts is None else _known(name, prompts)
            item = hashlib.sha256("".join(b.digest for b in prompt).encode()).hexdigest()[:20] if prompt else "all"
            found.append(entry_of(item, name, prompt, block, seed, stored))
    return found


def _known(name: str, prompts: Prompts) -> tuple[Prompt, int | None]:
    """What a file of prompts says of a file. Raises BadField where it says nothing, as for a line of it that is bad."""
    found = prompts.get(name) or prompts.get(PurePosixPath(name).stem)
    if found is None:
        raise BadField("file", f"a line of {' or '.join(PROMPTS)} that names it", "none", "no prompt for the file")
    return found


def _names(root: Path, folder: str) -> list[str]:
    """The files of a folder as names under root, sorted; hidden ones and the files of prompts are none of them."""
    with os.scandir(root / folder) as found:
        names = sorted(
            e.name
            for e in found
            if not e.name.startswith(".") and not e.is_dir(follow_symlinks=False) and e.name not in PROMPTS
        )
    return [f"{folder}/{name}" if folder else name for name in names]


def opened(root: Path, name: str) -> tuple[Block, Stored]:
    """A file under root as a block, after it has been decoded, and where to read it again. Raises BadField and DataError."""
    suffix = PurePosixPath(checked_text(name, "file name")).suffix.lower()
    if suffix not in KINDS:
        raise BadField("file", f"one of {', '.join(KINDS)}", shown(suffix), "not a supported kind of file")
    kind = KINDS[suffix]
    data = media.read(root, name, MAX_TEXT if kind == "text" else media.LIMITS.size)
    block = Block(kind, _text(data) if kind == "text" else data, name)
    if kind == "image":
        media.open_image(block)
    elif kind == "video":
        media.open_video(block, frames=1)
    elif kind == "audio":
        media.open_audio(block)
    return block, Stored(root, name, kind, hashlib.sha256(data).hexdigest())


def _text(data: bytes) -> str:
    try:
        return checked_text(data.decode(), "file")
    except UnicodeDecodeError as error:
        raise BadField("file", "text in UTF-8", str(error)[:200], "bad UTF-8") from None


def prompts_of(root: Path, ledger: Ledger) -> Prompts | None:
    """Prompt and seed by item, of the file of prompts in a folder; None without one."""
    file = next((root / name for name in PROMPTS if (root / name).is_file()), None)
    if file is None:
        return None
    found: dict[str, tuple[Prompt, int | None]] = {}
    for where, row in rows_of(file):
        with _counted(where, ledger):
            if isinstance(row, BadField):
                raise row
            item, asked = (checked_text(row.get(name), name) for name in ("item", "prompt"))
            found[item] = (text(asked),), None if row.get("seed") is None else whole_field(row, "seed", 0)
    return found


# Datasets


def dataset_entries(path: Path, ledger: Ledger) -> list[Entry]:
    """The candidates of a dataset, by prompt; the model that wrote one is its system, where the data name it."""
    format = detect(path)
    if not holds_candidates(format):
        raise DataError(f"{path}: holds pairs of format {format}; expected candidates, several answers to each prompt")
    groups, read = load_candidates(path, format=format, on_bad="skip")
    ledger.used, ledger.skipped, ledger.refused = read.used, read.skipped, read.refused
    ledger.notes, ledger.examples, ledger.problems = read.notes, read.examples, read.problems
    return [
        entry_of(item, str(candidate.meta.get("model") or ""), candidate.prompt, candidate.block, candidate.seed)
        for item, candidates in groups.items()
        for candidate in candidates
    ]


@contextmanager
def _counted(where: str, ledger: Ledger) -> Iterator[None]:
    """Counts what is done inside as used, or as refused with its reason where the data are to blame."""
    where = where.encode(errors="replace").decode()
    try:
        yield
    except BadField as problem:
        ledger.refuse(where, problem)
    except DataError as error:
        reason = error.reason if isinstance(error, media.ForbiddenPath) else "cannot be decoded"
        ledger.refuse(where, BadField("file", "a whole file under the folder", str(error), reason))
    else:
        ledger.used += 1
