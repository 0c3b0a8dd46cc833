"""Data in: finds out a dataset's format, imports its rows as pairs, and says what became of every one of them."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmpo.datasets import tables
from mmpo.datasets.ledger import BadField, Ledger, Policy
from mmpo.datasets.pairing import Candidate, by_prompt, pair_up
from mmpo.datasets.tables import columns_of, kind_of
from mmpo.errors import DataError, RecipeError
from mmpo.find import answers, find, names, prompts
from mmpo.pair import Block, Pair

ROOM = "datasets.formats"


def detect(path: str | Path) -> str:
    """The format of a file or folder, by its content. Raises DataError naming what was found and the formats there are."""
    path = Path(path)
    kind, columns = kind_of(path), columns_of(path)
    fitting = [n for n in names(ROOM) if importlib.import_module(f"mmpo.{ROOM}.{n}").recognises(kind, columns)]
    if len(fitting) == 1:
        return fitting[0]
    if not columns and not fitting:
        raise DataError(f"{path}: there is nothing to read in this {kind}")
    verdict = f"fits {' and '.join(fitting)}" if fitting else "fits no format"
    found = ", ".join(sorted(columns)[:12]) or "no columns"
    if kind == "csv" and not fitting and (other := separator_of(columns)):
        raise DataError(f"{path}: expected cells separated by commas (tabs in a .tsv); found the header {found}, with {other}")
    raise DataError(f"{path}: a {kind} with {found} {verdict}; set format to one of: {', '.join(names(ROOM))}")


def separator_of(columns: frozenset[str]) -> str | None:
    """What a header of one column seems to be separated by, where that is not what CSV is read with."""
    (header,) = columns if len(columns) == 1 else ("",)
    return next((repr(sign) for sign in (";", "\t", "|", ",") if sign in header), None)


def holds_candidates(format: str) -> bool:
    """Whether a format's rows are answers to be paired by their scores. Raises RecipeError when there is no such format."""
    return getattr(importlib.import_module(find(ROOM, format).__module__), "CANDIDATES", False)


def files_told(path: str | Path, format: str) -> list[str]:
    """What a format reads of a folder of parquet files, and what it leaves out, to print; nothing of any other path.

    A format that reads one file of its folder alone says under TABLE how that is called.
    """
    module = importlib.import_module(find(ROOM, format).__module__)
    return tables.files_told(Path(path), getattr(module, "TABLE", None))


def rows(
    path: str | Path,
    ledger: Ledger,
    *,
    format: str | None = None,
    root: str | Path | None = None,
    ties: Literal["drop", "soft"] = "drop",
    aspect: str | None = None,
) -> Iterator[Any]:
    """The rows of a dataset as Pairs (Candidates where the format holds those), one at a time; `ledger` accounts for them."""
    if ties not in ("drop", "soft"):
        raise ValueError(f"ties: expected 'drop' or 'soft', found {ties!r}")
    if not Path(path).exists():
        raise DataError(f"{path}: no such file or folder")
    importer = find(ROOM, format or detect(path))
    if aspect and not getattr(importlib.import_module(importer.__module__), "ASPECTS", False):
        raise RecipeError(f"aspect {aspect!r}: format {importer.__name__} has no scores by aspect")
    options = {"aspect": aspect} if aspect else {}
    return importer(Path(path), root=None if root is None else Path(root), ties=ties, ledger=ledger, **options)


def pairs(
    path: str | Path,
    ledger: Ledger,
    *,
    format: str | None = None,
    root: str | Path | None = None,
    ties: Literal["drop", "soft"] = "drop",
    aspect: str | None = None,
    strategy: str = "best_worst",
    margin: float = 0.0,
    seed: int = 0,
) -> Iterator[Pair]:
    """The pairs of a dataset, one at a time; candidates are all read first, because a pair depends on its whole group."""
    chosen = format or detect(path)
    items = rows(path, ledger, format=chosen, root=root, ties=ties, aspect=aspect)
    if not holds_candidates(chosen):
        return _numbered(items, ledger)
    made, drops = pair_up(_scored(items), strategy, margin=margin, seed=seed)
    ledger.notes.update({f"pairing dropped, {reason}": count for reason, count in drops.items()})
    return iter(made)


def load(
    path: str | Path,
    *,
    on_bad: Policy = "refuse",
    bad_budget: float = 1.0,
    limit: int | None = None,
    modality: str | None = None,
    **options: Any,
) -> tuple[list[Pair], Ledger]:
    """The pairs of a dataset, and the ledger of its rows.

    on_bad: "refuse" raises DataError at the first bad row, "skip" counts bad rows, "quarantine" keeps them in the ledger, too.
    bad_budget: DataError when more than this share of the rows read is bad. limit: stop after so many pairs.
    modality: rows made of what this modality does not take are bad, too.
    options are those of `pairs`. format: a file of datasets/formats, by default detected. root: the folder that paths in
    rows start from, by default the dataset's own. ties: "drop" counts and leaves them out, "soft" keeps them with label 0.5.
    aspect: of a format with scores by aspect, the one that counts. strategy, margin, seed: how candidates are paired (see
    mmpo.datasets.pairing), which also refuses unscored ones.
    Every image is decoded once, so that a run never meets a damaged one, and kept as the bytes of its file. A pair that
    occurs again gets the id `<id>#2`.
    """
    ledger = ledger_for(modality, on_bad)
    found = list(itertools.islice(pairs(path, ledger, **options), limit))
    ledger.check_budget(bad_budget)
    return found, ledger


def load_candidates(
    path: str | Path,
    *,
    format: str = "candidates",
    root: str | Path | None = None,
    aspect: str | None = None,
    on_bad: Policy = "refuse",
    bad_budget: float = 1.0,
    limit: int | None = None,
    modality: str | None = None,
) -> tuple[dict[str, list[Candidate]], Ledger]:
    """The first `limit` candidates of a file by prompt, scored or not, and the ledger: what judges and `pair_up` start from."""
    ledger = ledger_for(modality, on_bad)
    groups = by_prompt(itertools.islice(rows(path, ledger, format=format, root=root, aspect=aspect), limit))
    ledger.check_budget(bad_budget)
    return groups, ledger


def ledger_for(modality: str | None, on_bad: Policy) -> Ledger:
    """A ledger, for which rows made of what a modality does not take are bad, where one is named."""
    if modality is None:
        return Ledger(on_bad)
    return Ledger(on_bad, check=kinds_of(modality), lister=f"mmpo data validate --modality {modality}")


def kinds_of(modality: str) -> Callable[[Pair | Candidate], None]:
    """A check that prompts and answers are of the kinds that a modality takes; it raises BadField, which names the side.

    Answers of a kind that prompts have as well are turns of the same conversation: whatever prompts have may stand beside it.
    """
    asked, told = prompts(modality), answers(modality)
    beside = asked if told in asked else {told}

    def check(item: Pair | Candidate) -> None:
        for name, prompt, answer in _branches(item):
            for field, blocks, allowed in (("prompt", prompt, asked), (name, answer, beside)):
                found = {b.kind for b in blocks}
                if not found <= allowed or (field == name and found and told not in found):
                    expected = f"{' or '.join(sorted(allowed if field != name else {told}))} (modality {modality})"
                    raise BadField(field, expected, " and ".join(sorted(found)), f"{field} of another modality")

    return check


def _branches(item: Pair | Candidate) -> Iterator[tuple[str, tuple[Block, ...], tuple[Block, ...]]]:
    """Name, prompt and answer of all that gets a likelihood."""
    if isinstance(item, Candidate):
        yield "answer", item.prompt, (item.block,)
        return
    yield from (("chosen", item.prompt, item.chosen), ("rejected", item.prompt, item.rejected))
    yield from ((name, branch.prompt, branch.response) for name, branch in item.branches.items())


def _scored(candidates: Iterator[Candidate]) -> Iterator[Candidate]:
    for candidate in candidates:
        if candidate.score is None:
            raise DataError(f"prompt {candidate.prompt[0].data!r}: a candidate has no score; judge the file before pairing it")
        yield candidate


def _numbered(pairs: Iterator[Pair], ledger: Ledger) -> Iterator[Pair]:
    """Ids are made of content, so a repeated vote needs a number to have an id of its own."""
    seen: Counter[str] = Counter()
    for pair in pairs:
        seen[pair.id] += 1
        if (count := seen[pair.id]) > 1:
            ledger.notes["repeated pairs (kept)"] += 1
            pair = dataclasses.replace(pair, id=f"{pair.id}#{count}")
        yield pair
