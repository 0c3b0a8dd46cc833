"""From a recipe's data to pairs that train, pairs and prompts that are held out, and an account of every row.

A run's folder keeps the account (ledger.json), the bad rows where the recipe quarantines them (quarantine.jsonl, and
quarantine_shifted.jsonl of eval.shifted), and the digests of every pair and its media, in order (data_manifest.json), to which
a resumed run is held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpo import runfolder
from mmpo.checkpoint import write_atomic
from mmpo.datasets.ledger import Ledger, OverBudget
from mmpo.datasets.load import detect, files_told, holds_candidates, load, load_candidates
from mmpo.datasets.pairing import Candidate, by_prompt, digest, pair_up
from mmpo.errors import DataError
from mmpo.judging import Judge
from mmpo.pair import Block, Pair
from mmpo.schema import Recipe

Prompt = tuple[Block, ...]
PARTS = ("id", "prompt", "chosen", "rejected", "label, weight, margin or branches")  # of a row of a manifest
WORLD, ASSETS = "embedded/", Path(__file__).parent / "assets"
NAMED = 5  # rows in a message about drift


@dataclass(frozen=True)
class Prepared:
    """select, test: held-out prompts, disjoint; the first choose the best checkpoint, the second are reported.

    pairs: all of them, in the order of the data. shifted: pairs of another distribution, which are only measured, and the
    ledger of theirs.
    """

    train: list[Pair]
    heldout: list[Pair]
    train_prompts: list[Prompt]
    select: list[Prompt]
    test: list[Prompt]
    account: dict[str, Any]
    pairs: list[Pair]
    ledger: Ledger
    shifted: list[Pair] = field(default_factory=list)
    shifted_ledger: Ledger | None = None


def prepare(recipe: Recipe, embedded: str, judge: Judge | None) -> Prepared:
    """Read, judge, pair and split. Raises DataError when nothing is left to train on.

    Held-out prompts are those of all candidates, also where no two of a prompt's could be told apart. Pairs of one group, such
    as the collages that were made of one image, are all held out or all trained on; only a prompt that stands in several
    groups goes with the first of them by name.
    """
    spec, path = recipe.data, _located(recipe.data.path, embedded)
    format = spec.format or detect(path)
    pairs, asked, ledger, dropped = _read(recipe, path, format, judge, spec.limit)
    out = _held_out(pairs, asked, spec.heldout)
    train = [p for p in pairs if digest(*p.prompt) not in out]
    heldout = sorted((p for p in pairs if digest(*p.prompt) in out), key=lambda p: _hash(p.id))
    if not train:
        found = f"{len(pairs)} pairs, data.heldout {spec.heldout}; dropped: {dropped or 'none'}"
        raise DataError(f"{path}: no pairs to train on ({found})\n{ledger}")
    kept_out = {_question(prompt): prompt for prompt in asked if digest(*prompt) in out}
    prompts = sorted(kept_out.items(), key=lambda item: _hash(item[0]))
    middle = min(recipe.eval.prompts, (len(prompts) + 1) // 2)
    account: dict[str, Any] = {"source": path, "format": format, "rows": str(ledger), "dropped": dropped}
    account |= {"pairs": len(pairs), "heldout": len(heldout)}
    shifted, shifted_ledger, told = _shifted(recipe, judge)
    account |= {"shifted": told} if told else {}
    return Prepared(
        train,
        heldout[: recipe.eval.pairs],
        list({_question(p.prompt): p.prompt for p in train}.values()),
        [p for _, p in prompts[:middle]],
        [p for _, p in prompts[middle : middle + recipe.eval.test_prompts]],
        account,
        pairs,
        ledger,
        shifted,
        shifted_ledger,
    )


def _question(prompt: Prompt) -> str:
    """What two prompts have in common that ask the same: their text and, by digest, their media."""
    return "\0".join([Pair("", prompt).caption, *(b.digest for b in prompt if b.kind != "text")])


def _located(path: str | None, embedded: str) -> str:
    """Where data.path leads: the modality's own world, another that mmpo ships (embedded/NAME), or a file of the user's."""
    if path in (None, "embedded"):
        return embedded
    name = path.removeprefix(WORLD)
    return str(ASSETS / name / "candidates.parquet") if path.startswith(WORLD) and name.isidentifier() else path


def _read(
    recipe: Recipe, path: str, format: str, judge: Judge | None, limit: int | None
) -> tuple[list[Pair], list[Prompt], Ledger, dict[str, int]]:
    """The pairs of a file, the prompts it asks, the ledger of its rows, and what pairing dropped."""
    spec = recipe.data
    policy: dict[str, Any] = {
        "root": spec.root, "aspect": spec.aspect, "on_bad": spec.on_bad, "bad_budget": spec.bad_budget,
        "modality": recipe.modality,
    }  # fmt: skip
    if holds_candidates(format):
        groups, ledger = load_candidates(path, format=format, limit=limit, **policy)
        pairs, dropped = pair_candidates(recipe, [c for group in groups.values() for c in group], judge)
        return pairs, [group[0].prompt for group in groups.values()], ledger, dropped
    pairs, ledger = load(path, format=format, ties=spec.ties, limit=limit, **policy)
    return pairs, [p.prompt for p in pairs], ledger, {}


def _shifted(recipe: Recipe, judge: Judge | None) -> tuple[list[Pair], Ledger | None, dict[str, Any]]:
    """Pairs of eval.shifted, as many as are measured, drawn by a hash of their content; ledger and account of all its rows."""
    if (path := recipe.eval.shifted) is None:
        return [], None, {}
    format = detect(path)
    try:
        found, _, ledger, dropped = _read(recipe, path, format, judge, None)
    except OverBudget as error:
        error.shifted = True  # an account of its own: the rows to train on are not to blame
        raise
    ledger.notes.update({f"pairing dropped, {reason}": count for reason, count in dropped.items()})
    pairs = [p for p in found if p.chosen and p.rejected]
    if len(pairs) < len(found):
        ledger.notes["rows with one answer (not measured)"] += len(found) - len(pairs)
    if not pairs:
        raise DataError(f"eval.shifted {path}: no pairs of two answers\n{ledger}")
    measured = sorted(pairs, key=lambda p: _hash(p.id))[: recipe.eval.pairs]
    return measured, ledger, {"source": path, "format": format, "rows": str(ledger), "pairs": len(measured)}


def keep_account(folder: Path, data: Prepared, allow_drift: Sequence[str] = ()) -> None:
    """Print the account of the rows and write it into the run's folder; whatever a kill interrupts is written again.

    Raises DataError, naming the rows, when the run has begun with other pairs or media, unless `allow_drift` has "data".
    """
    path, new, begun = folder / "data_manifest.json", manifest(data.pairs), runfolder.begun(folder)
    if data.shifted_ledger is not None:
        new["shifted"] = {k: v for k, v in manifest(data.shifted).items() if k != "drift"}
    if begun and not path.exists():
        print(f"{path} is missing: whether the data is that of the run's start cannot be told")
    new["drift"] = _settled(folder, _read_manifest(path) if begun and path.exists() else new, new, data, allow_drift)
    counts = data.ledger.counts()
    _tell(data.account, data.ledger)
    _keep_bad(folder / "quarantine.jsonl", data.ledger)
    if data.shifted_ledger is not None:
        print("eval.shifted, which is only measured:")
        _tell(data.account["shifted"], data.shifted_ledger)
        counts["shifted"] = data.shifted_ledger.counts()
    _keep_bad(folder / "quarantine_shifted.jsonl", data.shifted_ledger)
    write_atomic(folder / "ledger.json", (json.dumps(counts, indent=1) + "\n").encode())
    rows = ",\n".join(json.dumps(row) for row in new.pop("rows"))
    write_atomic(path, f'{json.dumps(new)[:-1]}, "rows": [\n{rows}\n]}}\n'.encode())


@contextlib.contextmanager
def refusal_accounted(folder: Path) -> Iterator[None]:
    """Keep the account and the bad rows of a dataset that is refused for too many of them, as of one that is not.

    Not where the run has begun: its folder keeps the account of the data that it was trained on.
    """
    try:
        yield
    except OverBudget as error:
        if not runfolder.begun(folder):
            counts = error.ledger.counts()
            _keep_bad(folder / f"quarantine{'_shifted' * error.shifted}.jsonl", error.ledger)
            told = json.dumps({"shifted": counts} if error.shifted else counts, indent=1)
            write_atomic(folder / "ledger.json", (told + "\n").encode())
        raise


def _settled(
    folder: Path, old: dict[str, Any], new: dict[str, Any], data: Prepared, allow_drift: Sequence[str]
) -> list[dict[str, Any]]:
    """The notes of what differs from the run's start, one more where it does now. Raises DataError unless that is allowed."""
    changes, note = drift(old, new, data.pairs), {"was": old["digest"], "now": new["digest"]}
    if "shifted" in old and "shifted" in new:  # a manifest of an older mmpo has none: nothing to hold them to
        was, now = old["shifted"], new["shifted"]
        if others := [f"eval.shifted: {line}" for line in drift(was, now, data.shifted)]:
            changes, note = changes + others, note | {"shifted_was": was["digest"], "shifted_now": now["digest"]}
    if not changes:
        return old["drift"]
    told = f"{data.account['source']}: not the data that the run in {folder} was started with: " + "; ".join(changes)
    if "data" not in allow_drift:
        raise DataError(f"{told}. Put the data back, use another out=, or continue all the same with --allow-drift data")
    print(f"{told}; continued, as allowed")
    return [*old["drift"], {**note, "changes": changes}]


def _tell(account: Mapping[str, Any], ledger: Ledger) -> None:
    print("\n".join([*files_told(account["source"], account["format"]), str(ledger)]))


def _keep_bad(path: Path, ledger: Ledger | None) -> None:
    """The bad rows of a ledger in a file of their own, which is there only if there are any."""
    if ledger is not None and ledger.quarantined:
        write_atomic(path, ledger.quarantine())
    else:
        path.unlink(missing_ok=True)


def manifest(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What training depends on: for each pair, in order, its id and the digests of its parts, and the digest of them all."""
    rows = [_digests(pair) for pair in pairs]
    return {"digest": _hash(json.dumps(rows)), "pairs": len(rows), "drift": [], "rows": rows}


def _digests(pair: Pair) -> list[str]:
    sides = ["".join(b.digest for b in blocks) for blocks in (pair.prompt, pair.chosen, pair.rejected)]
    branches = [(name, [b.digest for b in (*x.prompt, *x.response)]) for name, x in sorted(pair.branches.items())]
    numbers = f"{pair.label:.6g} {pair.weight:.6g} {pair.margin:.6g}"  # a judge's last bits depend on the machine
    return [pair.id, *(_hash(side)[:32] for side in sides), numbers + (f" {_hash(str(branches))[:32]}" if branches else "")]


def drift(old: dict[str, Any], new: dict[str, Any], pairs: Sequence[Pair]) -> list[str]:
    """What differs between two manifests, a line each, the first few rows by name; pairs: those of the new one."""
    before, after = old["rows"], new["rows"]
    if before == after:
        return []
    if sorted(before) == sorted(after):
        return ["the same pairs in another order"]
    if len(before) == len(after):
        places = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        lines = [f"pair {i} ({after[i][0]}) has another {_changed(before[i], after[i], pairs[i])}" for i in places[:NAMED]]
    else:
        ids = [{row[0] for row in rows} for rows in (before, after)]
        gone, fresh = sorted(ids[0] - ids[1]), sorted(ids[1] - ids[0])
        lines = [f"{len(before)} pairs then, {len(after)} now"]
        lines += [f"{word}: {', '.join(names[:NAMED])}" for word, names in (("gone", gone), ("new", fresh)) if names]
        places = []
    return lines + ([f"and {len(places) - NAMED} more"] if len(places) > NAMED else [])


def _changed(before: list[str], after: list[str], pair: Pair) -> str:
    """The parts of a row that differ, with the files of its media; the id is one only where nothing else is."""
    parts = [i for i in range(1, len(PARTS)) if before[i] != after[i]]
    files = {i: [b.path for b in blocks if b.path] for i, blocks in ((1, pair.prompt), (2, pair.chosen), (3, pair.rejected))}
    return " and ".join(PARTS[i] + (f" ({', '.join(files[i])})" if files.get(i) else "") for i in parts) or PARTS[0]


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        for part in (found, found.get("shifted", found)):
            if part["digest"] != _hash(json.dumps(part["rows"])) or not isinstance(found["drift"], list):
                raise ValueError("its rows are not those of its digest")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); put it back, or remove it to go on with the data as it is") from error
    return found


def pair_candidates(recipe: Recipe, rows: Sequence[Candidate], judge: Judge | None) -> tuple[list[Pair], dict[str, int]]:
    """Judge the candidates that carry no score and pair them up as the recipe says."""
    spec = recipe.data.pairing
    if spec is None:
        raise DataError("these rows are single candidates: set data.pairing, e.g. pairing: {strategy: best_worst}")
    missing = [i for i, c in enumerate(rows) if c.score is None]
    if missing and judge is None:
        raise DataError(
            f"{len(missing)} of {len(rows)} candidates carry no score, and there is no judge: "
            "set judge.name, see `mmpo list judges`"
        )
    scored = list(rows)
    if missing and judge is not None:
        scores = judge([rows[i].prompt for i in missing], [(rows[i].block,) for i in missing]).scores.tolist()
        for i, score in zip(missing, scores, strict=True):
            scored[i] = dataclasses.replace(rows[i], score=score)
    pairs, dropped = pair_up(
        by_prompt(scored), spec.strategy, margin=spec.margin, max_per_prompt=spec.max_per_prompt, seed=recipe.seed
    )
    if spec.temperature:  # Bradley-Terry
        gaps = [(p.scores["chosen"] - p.scores["rejected"]) / spec.temperature for p in pairs]
        pairs = [dataclasses.replace(p, label=1 / (1 + math.exp(-gap))) for p, gap in zip(pairs, gaps, strict=True)]
    return pairs, dropped


def _held_out(pairs: Sequence[Pair], asked: Sequence[Prompt], share: float) -> set[str]:
    """The digests of the prompts that are held out: by their own hash, or by that of the first group that they stand in."""
    wide = {p.group for p in pairs if p.group != digest(*p.prompt)}  # of more than the prompt that names them
    groups: dict[str, str] = {}
    for pair in pairs:
        name = digest(*pair.prompt)
        if pair.group is not None and pair.group in wide:
            groups[name] = min(groups.get(name, pair.group), pair.group)
    found = {digest(*prompt): prompt for prompt in asked}
    return {n for n, p in found.items() if (_below(groups[n], share) if n in groups else is_heldout(p, share))}


def is_heldout(prompt: Prompt, share: float) -> bool:
    """Whether a prompt is held out: a function of its content, so the split survives new rows and other orders."""
    return _below("\0".join(b.digest for b in prompt), share)


def _below(value: str, share: float) -> bool:
    """True for this share of all values, by their hash."""
    return int(_hash(value)[:12], 16) / 16**12 < share


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
