"""The run report: one self-contained HTML page that says what a run changed, and how far to trust it.

It only reads the run folder (log.jsonl, summary.json, samples/, recipe.yaml, a checkpoint's manifest), so it can be written
again at any time and from a run that is still going: whatever is missing is left out of the page and named there. Pictures
and curves are inlined; the page asks nothing of the network, runs no script, and the same folder gives the same bytes.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from mmpo.curves import Record, curves, is_number
from mmpo.runfolder import number_of, of_sample

GALLERY = 12  # picture pairs shown; the page says how many there are
ANSWERS = 24  # and answers in words


def write_report(run: Path) -> Path:
    """Write run/report.html from what the run folder holds, and return its path.

    Reads log.jsonl, summary.json, recipe.yaml, samples/ (sheet.png, base/*.png and aligned/*.png with the same names, or
    base.jsonl and aligned.jsonl with the same lines) and the environment in the newest checkpoint's manifest; each may be
    missing. Raises ValueError when summary.json is not a JSON object.
    """
    summary = read_summary(run / "summary.json")
    records, unreadable = read_log(run / "log.jsonl")
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8") if (run / "recipe.yaml").is_file() else None
    gallery, total = picture_pairs(run / "samples", summary)
    answers, written = answer_pairs(run / "samples")
    sheet = run / "samples" / "sheet.png"
    page = template().render(
        summary=summary,
        headline=headline(summary),
        curves=curves(records, summary),
        scores=score_rows(summary),
        gallery=gallery,
        pictures=total,
        answers=answers,
        written=written,
        judged=any("score" in a["base"] or "score" in a["aligned"] for a in answers),
        compared=any("log_ratio" in a["base"] or "log_ratio" in a["aligned"] for a in answers),
        sheet=data_uri(sheet) if sheet.is_file() else None,
        timesteps=timestep_rows(summary, records),
        heldout=heldout_rows(summary, records),
        provenance=provenance_rows(summary, yaml.safe_load(recipe or "{}"), environment(run / "checkpoints")),
        ledger=ledger_rows(summary, records, unreadable),
        recipe=recipe,
    )
    target = run / "report.html"
    part = run / ".report.html.part"
    part.write_text(page, encoding="utf-8")
    os.replace(part, target)
    return target


def template() -> jinja2.Template:
    """The page's template, with autoescape: prompts are other people's text."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "sentence": sentence}
    return environment.from_string((resources.files("mmpo") / "report.html.j2").read_text(encoding="utf-8"))


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json, or an empty mapping while the run has not written one."""
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        message = f"{path}:{error.lineno}: not valid JSON ({error.msg}); remove it, and the training command writes it again"
        raise ValueError(message) from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(summary).__name__}")
    return summary


def read_log(path: Path) -> tuple[list[Record], int]:
    """The records of a JSONL log and the number of lines that are none, such as a last line torn by a kill."""
    records: list[Record] = []
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            unreadable += 1
    return records, unreadable


def environment(checkpoints: Path) -> dict[str, Any]:
    """The packages and devices of the run, as its newest checkpoint names them; empty before the first one."""
    newest = checkpoints / "CURRENT"
    manifest = checkpoints / newest.read_text().strip() / "MANIFEST.json" if newest.is_file() else newest
    return json.loads(manifest.read_text(encoding="utf-8"))["environment"] if manifest.is_file() else {}


# Words and numbers


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` decimals, anything else as it is; a missing or non-finite value is named, never blank."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "not measured" if value is None or isinstance(value, jinja2.Undefined) else str(value)
    if not math.isfinite(value):
        return "not finite"
    return (f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}").replace("-", "\N{MINUS SIGN}")


def sentence(words: Any) -> str:
    """With a capital letter and a full stop."""
    words = str(words)
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")


def percent(value: Any) -> str:
    """A fraction as a whole percentage."""
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%" if is_number(value) else number(value)


def duration(seconds: Any) -> str:
    """Seconds in the two largest units that say something."""
    if not is_number(seconds):
        return number(seconds)
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def headline(summary: Record) -> tuple[str, str]:
    """The verdict and the numbers behind it: the run's own words, cut at the first colon, else made from its win rate."""
    rate = summary.get("win_rate") or {}
    if summary.get("verdict"):
        verdict, _, numbers = str(summary["verdict"]).partition(": ")
        return sentence(verdict), sentence(numbers) if numbers else ""
    if rate.get("value") is None:
        return "The run has not been judged yet.", ""
    interval = f"95 % interval {percent(rate.get('low'))} to {percent(rate.get('high'))}."
    return f"The aligned model wins {percent(rate['value'])} of {rate.get('n', '?')} comparisons with its base.", interval


def score_rows(summary: Record) -> list[dict[str, Any]]:
    """One row per measure of the base and the aligned model; `change` only where both are numbers."""
    base, aligned = summary.get("base") or {}, summary.get("aligned") or {}
    names = {
        "score": f"{summary.get('judge') or 'judge'}, mean score",
        "correct": "exactly right",
        "length": "length, characters",
        "kl": "KL from the reference, nats per answer",
        "wrong_image": "right for another image of the prompt",
        "blind_correct": "exactly right with the images hidden",
    }
    rows = []
    for key in dict.fromkeys((*base, *aligned)):
        before, after = base.get(key), aligned.get(key)
        change = f"{after - before:+.3f}".replace("-", "\N{MINUS SIGN}") if is_number(before) and is_number(after) else ""
        rows.append({"name": names.get(key, key), "base": before, "aligned": after, "change": change})
    return rows


def timestep_rows(summary: Record, records: Sequence[Record]) -> Sequence[Record]:
    """Held-out accuracy and margin by part of the noise schedule: of the summary, else of the newest evaluation."""
    logged = [r["eval/by_time"] for r in records if r.get("eval/by_time")]
    return summary.get("by_timestep") or (logged[-1] if logged else [])


HELDOUT = {
    "eval/shifted_accuracy": "pairs of other data told apart",
    "eval/margin": "margin, nats",
    "eval/drift_chosen": "fall of the chosen side, nats",
    "eval/drift_rejected": "fall of the rejected side, nats",
    "eval/fell_chosen": "share of pairs whose chosen answer became less likely",
    "eval/fell_both": "share of pairs both of whose answers did",
    "eval/length_correlation": "correlation of the implicit reward with length",
    "eval/top_mass": "probability of the 10 likeliest tokens",
    "eval/top_entropy": "entropy over them, nats per token",
}


def heldout_rows(summary: Record, records: Sequence[Record]) -> list[tuple[str, Any]]:
    """What held-out pairs say beside their accuracy, at the kept checkpoint or else the newest evaluation; and their CHES."""
    seen = [r for r in records if r.get("event") == "eval"]
    kept = [r for r in seen if r.get("step") == summary.get("best_step")] or seen
    start = next((r for r in records if r.get("event") == "start"), {})
    rows = [(words, kept[-1].get(name)) for name, words in HELDOUT.items()] if kept else []
    return [row for row in [*rows, ("ln-CHES under the model at the start", start.get("ln_ches"))] if is_number(row[1])]


def provenance_rows(summary: Record, recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What the run was made of: model, method, data and judge, seed, and the packages it ran on; unknown ones are left out."""
    model, data, reference = (recipe.get(part) or {} for part in ("model", "data", "reference"))
    seed = summary.get("seed", recipe.get("seed"))
    rows = [
        ("model", model.get("path")),
        ("adapter", model.get("adapter")),
        ("trainable parameters", (summary.get("parameters") or {}).get("trainable")),
        ("objective", " + ".join(str(term.get("loss")) for term in recipe.get("objective") or ()) or None),
        ("reference", reference.get("kind")),
        ("data", data.get("path")),
        ("judge", summary.get("judge")),
        ("seed", None if seed is None else str(seed)),
        ("steps refused, not finite", summary.get("skipped_steps")),
        ("ran with", ", ".join(f"{name} {value}" for name, value in environment.items()) or None),
    ]
    return [(name, value) for name, value in rows if value is not None]


def ledger_rows(summary: Record, records: Sequence[Record], unreadable: int) -> list[tuple[str, Any]]:
    """What went in and what became of it: pairs by split, rows by what happened to them, log lines."""
    rows = [*flat("", summary.get("data") or {}), *flat("pairs", summary.get("pairs") or {})]
    rows = [(LEDGER.get(name, name), value) for name, value in rows]
    rows.append(("log records", len(records)))
    if unreadable:
        rows.append(("log lines that could not be read and are not in the curves", unreadable))
    return rows


LEDGER = {
    "pairs": "pairs made",
    "heldout": "of them held out",
    "pairs, train": "pairs trained on",
    "pairs, heldout": "held-out pairs measured",
}


def flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, each with its path in words."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(f"{name}, {key}" if name else str(key), inner)
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, value


# Pictures


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def picture_pairs(samples: Path, summary: Record) -> tuple[list[dict[str, str]], int]:
    """Base and aligned pictures of the same name, GALLERY of them with captions, and how many there are.

    In the order of their numbers, but no prompt comes twice before every prompt has come once. Captions: what
    `summary["prompts"]` says of the number or the stem of a file; else the stem.
    """
    found = [p.name for p in (samples / "base").glob("*.png") if (samples / "aligned" / p.name).is_file()]
    names = sorted(found, key=_by_number)
    told = {name: of_sample(summary.get("prompts") or [], Path(name).stem) for name in names}
    captions = {name: Path(name).stem if said is None else str(said) for name, said in told.items()}
    shown = first_of_each(names, captions)[:GALLERY]
    sides = ("base", "aligned")
    return [{"prompt": captions[n]} | {side: data_uri(samples / side / n) for side in sides} for n in shown], len(names)


def _by_number(name: str) -> tuple[float, str]:
    """Where a picture stands among others: names that are no numbers come after those that are."""
    number = number_of(Path(name).stem)
    return math.inf if number is None else number, name


def first_of_each(names: Sequence[Any], captions: Mapping[Any, str]) -> list[Any]:
    """The names in their order, but no caption comes twice before every caption has come once."""
    counter: Counter[str] = Counter()
    place = {}
    for name in names:
        place[name] = counter[captions[name]]
        counter[captions[name]] += 1
    return sorted(names, key=place.__getitem__)


# Words


def answer_pairs(samples: Path) -> tuple[list[dict[str, Any]], int]:
    """Base and aligned answers to the same prompts, ANSWERS of them in the order of `first_of_each`, and how many there are.

    Reads base.jsonl and aligned.jsonl, a line each: prompt, text, and where they are known score, correct, log_ratio, and
    pictures, the files of the prompt's images under pictures/.
    """
    base, aligned = (read_log(samples / f"{side}.jsonl")[0] for side in ("base", "aligned"))
    both = [(b, a) for b, a in zip(base, aligned, strict=False) if b.get("prompt") == a.get("prompt")]
    rows = [{"prompt": str(b.get("prompt", "")), "base": _told(b), "aligned": _told(a)} for b, a in both]
    asked = {i: f"{row['prompt']}\0{both[i][0].get('pictures')}" for i, row in enumerate(rows)}
    order = first_of_each(range(len(rows)), asked)
    shown = order[:ANSWERS]
    return [rows[i] | {"pictures": _shown(samples / "pictures", both[i][0].get("pictures"))} for i in shown], len(rows)


def _shown(folder: Path, names: Any) -> list[str]:
    """The pictures of those names that are in the folder itself."""
    own = [name for name in names if Path(str(name)).name == name] if isinstance(names, list) else []
    return [data_uri(folder / name) for name in own if (folder / name).is_file()]


def _told(line: Record) -> dict[str, Any]:
    """The text of an answer and what was measured of it."""
    measured = {name: line[name] for name in ("score", "correct", "log_ratio") if line.get(name) is not None}
    return {"text": str(line.get("text", ""))} | measured
