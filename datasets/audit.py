"""Audits preference pairs of text: what a model could learn from them instead of what people meant, in plain words.

Each check is a finding with its numbers, a sentence, and what to do about it. Rates count every prompt once, however many
pairs it has, and come with Wilson's 95 % interval; where many features are looked at, with Bonferroni's correction.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmpo.datasets.formatting import FEATURES
from mmpo.datasets.ledger import Ledger
from mmpo.datasets.load import detect, load
from mmpo.datasets.near_copies import jaccard, near_copies, plain, triples
from mmpo.datasets.pairing import digest
from mmpo.datasets.separability import FOLDS, separate
from mmpo.errors import DataError
from mmpo.pair import Block, Pair

LEAK = 0.6  # a rule that knows nothing of the answers' worth may be right this often
TELLING = 0.05  # share of prompts in which a feature has to differ before it counts
COPIES = 0.01  # share of pairs that may be copies, contradictions, or equal but for white space
BOILERPLATE = 0.05  # share of pairs whose answer may occur under another prompt, or whose sides may be nearly the same
TIES = 0.25  # share of the rows that may be ties
SEPARABLE = 0.7  # area under the curve of words alone
MOST = 20_000  # pairs that the model of words is fitted to


@dataclass(frozen=True)
class Finding:
    """One check. alarm: whether something should be done. numbers: as JSON holds them. said: the result in a sentence."""

    name: str
    alarm: bool
    numbers: dict[str, Any]
    said: str
    advice: str = ""


@dataclass(frozen=True)
class Texts:
    """The pairs that have two sides, as text, N of them. prompts: their digests."""

    pairs: list[Pair]
    chosen: list[str]
    rejected: list[str]
    prompts: list[str]


@dataclass
class Audit:
    """What `audit` found in a dataset of `pairs` pairs, `unpaired` of which have one side only."""

    path: str
    format: str
    pairs: int
    prompts: int
    unpaired: int
    findings: list[Finding] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def alarms(self) -> list[Finding]:
        return [f for f in self.findings if f.alarm]

    def lines(self) -> list[str]:
        """The report, a line or two for each check, and the verdict at the end."""
        single = f", {self.unpaired} with one side only" if self.unpaired else ""
        found = [f"{self.path}: format {self.format}, {self.pairs} pairs of {self.prompts} prompts{single}"]
        found += str(self.ledger).splitlines()
        for finding in self.findings:
            found.append(f"{'ALARM' if finding.alarm else 'ok   '} {finding.name}: {finding.said}")
            found += [f"      do: {finding.advice}"] if finding.alarm else []
        return [*found, self.verdict]

    @property
    def verdict(self) -> str:
        if not self.alarms:
            return "verdict: nothing found that training on these pairs should wait for"
        return f"verdict: look at {'; '.join(f.name for f in self.alarms)} before training on these pairs"

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        told = {name: getattr(self, name) for name in ("path", "format", "pairs", "prompts", "unpaired", "verdict")}
        return told | {"findings": [asdict(f) for f in self.findings], "rows": self.ledger.counts()}


def audit(
    path: str | Path,
    *,
    against: str | Path | None = None,
    model: str | None = None,
    model_pairs: int = 200,
    **options: Any,
) -> Audit:
    """Audit the pairs of a dataset. options: those of `mmpo.datasets.load.load`; bad rows are counted by default.

    against: another split, in the same or another format, whose prompts should not be here. model: a transformers directory;
    `model_pairs` pairs, drawn by hash, are scored under it. Raises DataError when there are no pairs, or pairs that are not
    text, and MissingExtra or an error of the model's for a model that cannot be loaded.
    """
    pairs, ledger = load(path, **{"on_bad": "skip"} | options)
    if not pairs:
        raise DataError(f"{path}: no pairs to audit\n{ledger}")
    if media := {b.kind for p in pairs for b in (*p.prompt, *p.chosen, *p.rejected)} - {"text"}:
        raise DataError(f"{path}: the audit reads text, and these pairs hold {', '.join(sorted(media))}")
    both = [p for p in pairs if p.chosen and p.rejected]
    texts = Texts(both, [_said(p.chosen) for p in both], [_said(p.rejected) for p in both], [digest(*p.prompt) for p in both])
    found = [_ties(pairs, ledger), _repeats(pairs), _prompts(pairs)]
    if both:
        found += [_length(texts), *_formats(texts), _equal_sides(texts), _boilerplate(texts), _words(texts)]
    if against is not None:
        found.append(_overlap(pairs, against))
    if model is not None:
        from mmpo.datasets.off_policy import off_policy

        found.append(off_policy(sorted(both, key=lambda p: _hash(p.id))[:model_pairs], model))
    prompts = len({digest(*p.prompt) for p in pairs})
    return Audit(
        str(path), str(options.get("format") or detect(path)), len(pairs), prompts, len(pairs) - len(both), found, ledger
    )


def interval(share: float, count: float, tests: int = 1) -> tuple[float, float]:
    """Wilson's interval of a share among `count` trials, at 95 % for all of `tests` such intervals together."""
    if not count:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(1 - 0.025 / tests)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def _rate(hits: Sequence[float], texts: Texts, places: Sequence[int] | None = None, tests: int = 1) -> dict[str, float]:
    """The share of hits, every prompt counted once, its interval, and the number of prompts; of some places only, if given."""
    chosen = range(len(hits)) if places is None else places
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for i in chosen:
        by_prompt[texts.prompts[i]].append(hits[i])
    means = [sum(found) / len(found) for found in by_prompt.values()]
    share = sum(means) / len(means) if means else 0.0
    low, high = interval(share, len(means), tests)
    return {"rate": share, "low": low, "high": high, "prompts": len(means)}


def _said(blocks: Sequence[Block]) -> str:
    """What the assistant says in an answer."""
    return "\n\n".join(str(b.data) for b in blocks if b.role in (None, "assistant"))


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _percent(rate: dict[str, float]) -> str:
    return f"{rate['rate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"


def _leaks(rate: dict[str, float]) -> bool:
    return rate["low"] > LEAK or rate["high"] < 1 - LEAK


def _length(texts: Texts) -> Finding:
    """Whether length alone tells the sides apart; answers of equal length count half."""
    lengths = [(len(a), len(b)) for a, b in zip(texts.chosen, texts.rejected, strict=True)]
    rate = _rate([0.5 if a == b else float(a > b) for a, b in lengths], texts)
    medians = [statistics.median(side) for side in zip(*lengths, strict=True)]
    numbers = {**rate, "median_chosen": medians[0], "median_rejected": medians[1]}
    said = f"the longer answer is chosen in {_percent(rate)} of prompts; median {medians[0]:g} and {medians[1]:g} characters"
    longer = rate["rate"] > 0.5
    return Finding(
        "length", _leaks(rate), numbers, said,
        f"a model can win by writing {'more' if longer else 'less'}: use a length-aware loss (simpo, ld reduction, rdpo), "
        "balance the pairs by length, and report length beside reward",
    )  # fmt: skip


def _formats(texts: Texts) -> list[Finding]:
    """One finding for all features of `FEATURES`, and one more for each of them that leaks."""
    rates = {name: _feature(name, test, texts) for name, test in FEATURES.items()}
    leaks = {n: r for n, r in rates.items() if r["coverage"] >= TELLING and _leaks(r)}
    shown = sorted((n for n, r in rates.items() if r["coverage"] >= TELLING), key=lambda n: -abs(rates[n]["rate"] - 0.5))
    best = ", ".join(f"{n} {rates[n]['rate']:.1%}" for n in shown[:3]) or "none in enough pairs"
    whole = Finding("format", False, rates, f"chosen where only one side has it: {best}; {len(leaks)} of {len(rates)} leak")
    return [whole] + [
        Finding(
            f"format, {name}", True, rate,
            f"where only one side has it, that side is {'chosen' if rate['rate'] > 0.5 else 'rejected'} in "
            f"{max(rate['rate'], 1 - rate['rate']):.1%} of prompts ({rate['coverage']:.1%} of them differ)",
            "a model can win by this alone: normalise it on both sides, or add pairs in which the other side has it",
        )
        for name, rate in leaks.items()
    ]  # fmt: skip


def _feature(name: str, test: Callable[[str], bool], texts: Texts) -> dict[str, float]:
    """How often the side with a feature is chosen, where one alone has it; coverage: the share of prompts with such pairs."""
    has = [(test(a), test(b)) for a, b in zip(texts.chosen, texts.rejected, strict=True)]
    differ = [i for i, (a, b) in enumerate(has) if a != b]
    rate = _rate([float(a) for a, _ in has], texts, differ, len(FEATURES))
    return rate | {"coverage": rate["prompts"] / len(set(texts.prompts))}


def _ties(pairs: Sequence[Pair], ledger: Ledger) -> Finding:
    """Ties that were left out by the importer, and those that are kept with label 0.5."""
    dropped = ledger.skipped["tie"] + sum(n for note, n in ledger.notes.items() if "equal rank" in note or "tied" in note)
    kept = sum(p.label == 0.5 for p in pairs)
    share = (dropped + kept) / max(len(pairs) + dropped, 1)
    said = f"{dropped} left out and {kept} kept with label 0.5, {share:.1%} of all"
    return Finding(
        "ties", share > TIES, {"dropped": dropped, "kept": kept, "share": share}, said,
        "the judge often sees no difference: keep ties as soft labels (data.ties: soft), or ask for finer scores",
    )  # fmt: skip


def _repeats(pairs: Sequence[Pair]) -> Finding:
    """Pairs that occur again, and pairs whose reverse occurs, too."""
    ids = Counter(p.id.partition("#")[0] for p in pairs)
    repeated = sum(n - 1 for n in ids.values())
    sides = [tuple(tuple(b.digest for b in side) for side in (p.prompt, p.chosen, p.rejected)) for p in pairs]
    known = set(sides)
    reversed_ = sum((prompt, b, a) in known for prompt, a, b in sides if a and b)
    share, against = repeated / len(pairs), reversed_ / len(pairs)
    numbers = {"repeated": repeated, "repeated_share": share, "contradicted": reversed_, "contradicted_share": against}
    said = f"{repeated} pairs ({share:.1%}) occur before; {reversed_} ({against:.1%}) occur with the opposite preference"
    return Finding(
        "copies", share > COPIES or against > COPIES, numbers, said,
        "remove the copies, and decide contradictions by majority or with a soft label: they count twice, or for nothing",
    )  # fmt: skip


def _prompts(pairs: Sequence[Pair]) -> Finding:
    """Prompts that are nearly the same, which a split by prompt would put on both sides, and prompts with very many pairs."""
    counts = Counter(digest(*p.prompt) for p in pairs)
    first = {digest(*p.prompt): _asked(p) for p in reversed(pairs)}
    copies = _near(list(first.values()))
    share, most = copies / len(first), max(counts.values())
    dominant = most / len(pairs) > 0.05 and len(counts) > 20
    numbers = {"prompts": len(first), "near_copies": copies, "near_share": share, "most_pairs": most}
    said = f"{copies} of {len(first)} prompts ({share:.1%}) nearly repeat another; the commonest has {most} of the pairs"
    return Finding(
        "prompts", share > BOILERPLATE or dominant, numbers, said,
        "split by groups of like prompts, not at random, or held-out numbers will be too good; thin out common prompts",
    )  # fmt: skip


def _near(texts: list[str]) -> int:
    """How many texts are a near copy of an earlier one."""
    return sum(root != i for i, root in enumerate(near_copies(texts)))


def _asked(pair: Pair) -> str:
    return "\n".join(str(b.data) for b in pair.prompt)


def _equal_sides(texts: Texts) -> Finding:
    """Sides that differ in case or white space only, and sides that are nearly the same."""
    same = nearly = 0
    for a, b in zip(texts.chosen, texts.rejected, strict=True):
        if plain(a) == plain(b):
            same += 1
        elif jaccard(triples(a), triples(b)) >= 0.9:
            nearly += 1
    shares = same / len(texts.chosen), nearly / len(texts.chosen)
    said = f"{same} pairs ({shares[0]:.1%}) differ in case or white space only, {nearly} more ({shares[1]:.1%}) hardly at all"
    numbers = {"same": same, "same_share": shares[0], "nearly": nearly, "nearly_share": shares[1]}
    return Finding(
        "equal sides", shares[0] > COPIES or shares[1] > BOILERPLATE, numbers, said,
        "drop pairs without a difference; for small edits weight the changed words (spans, mask_dpo)",
    )  # fmt: skip


def _boilerplate(texts: Texts) -> Finding:
    """Answers that occur, or nearly, under several prompts, by side."""
    answers, count = [*texts.chosen, *texts.rejected], len(texts.chosen)
    roots, under = near_copies(answers), defaultdict(set)
    for root, prompt in zip(roots, texts.prompts * 2, strict=True):
        under[root].add(prompt)
    repeated = [len(under[root]) > 1 for root in roots]
    shares = [sum(repeated[:count]) / count, sum(repeated[count:]) / count]
    worst = max(under, key=lambda root: len(under[root]))
    said = f"{shares[0]:.1%} of chosen and {shares[1]:.1%} of rejected answers also answer another prompt, or nearly"
    if any(repeated):
        said += f"; the commonest, {plain(answers[worst])[:40]!r}, {len(under[worst])} prompts"
    numbers = {"chosen_share": shares[0], "rejected_share": shares[1], "commonest": answers[worst][:200]}
    numbers["most_prompts"] = len(under[worst])
    uneven = abs(shares[0] - shares[1]) > BOILERPLATE
    return Finding(
        "stock answers", uneven, numbers, said,
        "one side gives the same answer to many questions, which is learnt before anything else: thin these pairs out",
    )  # fmt: skip


def _words(texts: Texts) -> Finding:
    """Whether a bag of words, fitted on other prompts, tells the sides apart."""
    order = sorted(range(len(texts.pairs)), key=lambda i: _hash(texts.pairs[i].id))[:MOST]
    chosen, rejected, prompts = ([side[i] for i in order] for side in (texts.chosen, texts.rejected, texts.prompts))
    used = Texts([texts.pairs[i] for i in order], chosen, rejected, prompts)
    found = separate(used.chosen, used.rejected, [int(p, 16) % FOLDS for p in used.prompts])
    if found is None:
        return Finding("words", False, {}, "too few prompts to ask what words alone tell")
    rate = _rate(found.right.tolist(), used)
    numbers = {"auc": found.auc, **rate, "chosen_words": found.chosen_words, "rejected_words": found.rejected_words}
    said = (
        f"words alone order {_percent(rate)} of unseen prompts, area under the curve {found.auc:.2f}; "
        f"chosen: {' '.join(found.chosen_words[:5])}, rejected: {' '.join(found.rejected_words[:5])}"
    )
    return Finding(
        "words", found.auc > SEPARABLE and rate["low"] > LEAK, numbers, said,
        "the sides are told apart without understanding, often because two models wrote them: take both answers from one "
        "model, and hold out a part in which these words are balanced",
    )  # fmt: skip


def _overlap(pairs: Sequence[Pair], against: str | Path) -> Finding:
    """Prompts that are also, or nearly, in another split."""
    others = {digest(*p.prompt): _asked(p) for p in load(against, on_bad="skip")[0]}
    here = {digest(*p.prompt): _asked(p) for p in pairs}
    exact = len(here.keys() & others.keys())
    roots = near_copies([*others.values(), *here.values()])
    theirs = set(roots[: len(others)])
    near = sum(root in theirs for root in roots[len(others) :])
    numbers = {"prompts": len(here), "exact": exact, "near_or_exact": near, "share": near / len(here)}
    said = f"{near} of {len(here)} prompts ({near / len(here):.1%}) are in {Path(against).name}, {exact} of them word for word"
    advice = "take them out of one of the two: results on prompts that were trained on say nothing"
    return Finding("overlap", near / len(here) > COPIES, numbers, said, advice)
