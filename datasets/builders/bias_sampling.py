"""BDHS (arXiv 2407.02477): rejected answers from the model itself while it can hardly see the picture.

All but about one in a hundred of the image's tokens are hidden from the answer. Guided by the known answer, the model only
ends each of its sentences, from a point drawn at random on; what it makes up is what it expects without looking. An answer
that begins with yes or no has that word flipped half of the time.

The paper's Online-BDHS answers anew with the policy of each step. Nothing here does so: a build has one generator, and the
rounds of `mmpo train` run no builder. By hand it is a build with the export of a run as its generator, then a run on its pairs;
docs/pairs.md has the commands. Its Mixed-DPO draws one of two sorts of pairs at each step; `on_policy=0.5` draws once a record.

There is no public code. Of three things the paper's text, as far as we know it, leaves open how they are: the temperature
(sampling here is from the unchanged distribution); whether a flip is drawn once a record (as here, see `_Sampler.sampled`) or
anew for each try; and what becomes of a tail that is no sentence after `tail_tokens` (here it spends a try).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmpo.datasets.builders.rank_and_sift import decided
from mmpo.datasets.sampling import answer_of
from mmpo.datasets.sentences import first_sentence, is_ended, sentences, word_starts
from mmpo.datasets.stages import Dropped, Record, Result, Stage, at_least, each
from mmpo.datasets.tools import Embedder, Generator, PairJudge, Prompt, Tools
from mmpo.datasets.vectors import cosines
from mmpo.media import open_image
from mmpo.pair import Pair, text

NEEDS: frozenset[str] = frozenset({"generator", "text_embedder"})
YES_NO = re.compile(r"\s*(Yes|yes|No|no)\b")
OTHER = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


def bias_sampling(
    tools: Tools,
    *,
    hide_images: float = 0.99,
    similarity: float = 0.97,
    tries: int = 5,
    flip: float = 0.5,
    guided: bool = True,
    on_policy: float = 0.0,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    tail_tokens: int = 64,
    batch: int = 8,
) -> list[Stage]:
    """Stages of BDHS. A record needs an image in its prompt and an answer.

    hide_images: share of image tokens that an answer cannot attend to. similarity: an attempt whose text cosine with the
    answer is at or above is repeated with other tokens hidden and other points drawn. tries: how often in all; the last of
    several goes without guidance and is taken as it comes, unless it is empty or the answer itself. flip: how often a leading
    yes or no is turned round. guided: off, every attempt is a free answer. on_policy: share of records whose pair is instead
    two answers of the model that sees all, ranked by the pair judge in both orders. temperature, max_new_tokens: of whole
    answers; tail_tokens: of a sentence's end, beyond which the attempt has failed. Raises ValueError for shares outside
    [0, 1], tries < 1, and a missing tool.
    """
    shares = {"hide_images": hide_images, "flip": flip, "on_policy": on_policy}
    if wrong := [name for name, share in shares.items() if not 0 <= share <= 1]:
        raise ValueError(f"bias_sampling.{wrong[0]}: expected a share in [0, 1], got {shares[wrong[0]]}")
    if tries < 1:
        raise ValueError(f"bias_sampling.tries: expected at least 1, got {tries}")
    at_least(max_new_tokens=(max_new_tokens, 1), tail_tokens=(tail_tokens, 1), temperature=(temperature, 0))
    if tools.generator is None or tools.text_embedder is None:
        raise ValueError("bias_sampling: expected a generator and a text_embedder")
    if on_policy and (tools.pair_judge is None or not temperature):
        raise ValueError("bias_sampling.on_policy: two answers are ranked: expected a pair_judge and a temperature above 0")
    embedder, judge = tools.text_embedder, tools.pair_judge
    options = (hide_images, similarity, tries, flip, guided, temperature, max_new_tokens, tail_tokens)
    sampler = _Sampler(tools.generator, embedder, *options)
    stages = [each("check", _checked), Stage("sample", batch, sampler.sampled), each("pair", _pair)]
    if on_policy and judge is not None:
        stages.insert(1, Stage("rank", batch, lambda records, randoms: _ranked(records, randoms, sampler, judge, on_policy)))
    return stages


def flipped(answer: str) -> str | None:
    """The answer with its leading yes or no turned round, in the same case; None where it begins with neither."""
    found = YES_NO.match(answer)
    return answer[: found.start(1)] + OTHER[found[1]] + answer[found.end(1) :] if found else None


@dataclass(frozen=True)
class Head:
    """A sentence to be ended. before: all sentences in front of it. own: its beginning, which stays; all of it where `whole`.

    after: the white space behind it. stops: it ended with a stop, so that another end has to have one as well.
    """

    before: str
    own: str
    after: str
    whole: bool
    stops: bool

    @property
    def prefix(self) -> str:
        """What the model continues. It ends with a word: in tokens, white space belongs to the word that follows."""
        return (self.before + self.own).rstrip()

    def ended(self, answer: str) -> str:
        """The sentence with the end that an answer with this prefix gave it."""
        continuation = answer[len(self.prefix) :]
        written = self.own.rstrip() + continuation if self.own.strip() else continuation.lstrip()
        return first_sentence(written) + self.after


def heads(reference: str, random: np.random.Generator, keep: int = 0) -> list[Head]:
    """A Head for each sentence, up to a random word of it, which is the first to be written anew.

    keep: words of the first sentence that are part of its head in any case.
    """
    found: list[Head] = []
    before = ""
    for sentence in sentences(reference):
        end = len(sentence.rstrip())
        cuts = [*word_starts(sentence), end]
        least = 0 if found else min(keep, len(cuts) - 1)
        cut = cuts[int(random.integers(least, max(least + 1, len(cuts) - 1)))]
        found.append(Head(before, sentence[:cut], sentence[end:], cut == end, is_ended(sentence)))
        before += sentence
    return found


@dataclass(frozen=True)
class _Sampler:
    """The tools, and how they are used."""

    generator: Generator
    embedder: Embedder
    hide_images: float
    similarity: float
    tries: int
    flip: float
    guided: bool
    temperature: float
    max_new_tokens: int
    tail_tokens: int

    def sampled(self, records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[Result]:
        """Attempt after attempt, all records in one call that have none yet that is different enough.

        A record is flipped in all of its attempts or in none: drawn anew, those that differ enough would mostly be the flipped.
        """
        flips = [random.random() < self.flip for random in randoms]
        results: dict[int, Result] = {at: r for at, r in enumerate(records) if "rejected" in r.fields}
        tried: dict[int, list[float]] = {at: [] for at in range(len(records)) if at not in results}
        for attempt in range(1, self.tries + 1):
            ask = [at for at in tried if at not in results]
            last = attempt == self.tries > 1
            guide = self.guided and not last
            chosen = [records[at] for at in ask], [randoms[at] for at in ask]
            said = self._guided(*chosen, [flips[at] for at in ask]) if guide else self._free(*chosen)
            alike = self._cosines([str(records[at].answer) for at in ask], said)
            for at, answer, cosine in zip(ask, said, alike, strict=True):
                tried[at].append(round(cosine, 4))
                if answer and answer != records[at].answer and (last or cosine < self.similarity):
                    told = {"text_cosines": tried[at], "attempt": attempt, "guided": guide}
                    results[at] = _with_sides(records[at], str(records[at].answer), answer, told)
        return [results.get(at, Dropped("no attempt differs from the answer")) for at in range(len(records))]

    def _cosines(self, first: list[str], second: list[str]) -> list[float]:
        return cosines(self.embedder, [text(t) for t in first], [text(t) for t in second]).tolist() if first else []

    def _guided(self, records: Sequence[Record], randoms: Sequence[np.random.Generator], flips: Sequence[bool]) -> list[str]:
        """Every sentence of every record ended by the model, in one call: hidden tokens by the answer, draws by the sentence.

        Empty where a sentence broke off: pairs would be told apart by that.
        """
        begun = [self._heads(str(r.answer), g, f) for r, g, f in zip(records, randoms, flips, strict=True)]
        hidden = _seeds(randoms)
        open_heads = [(at, head) for at, found in enumerate(begun) for head in found if not head.whole]
        said = iter(
            self.generator(
                [records[at].prompt for at, _ in open_heads],
                _seeds([randoms[at] for at, _ in open_heads]),
                hide_seeds=[hidden[at] for at, _ in open_heads],
                prefixes=[head.prefix for _, head in open_heads],
                hide_images=self.hide_images,
                temperature=self.temperature,
                max_new_tokens=self.tail_tokens,
            )
            if open_heads
            else []
        )
        ended = [[h.own + h.after if h.whole else h.ended(next(said).text) for h in found] for found in begun]
        whole = [all(is_ended(s) or not h.stops for s, h in zip(*pair, strict=True)) for pair in zip(ended, begun, strict=True)]
        return ["".join(pieces).strip() if fine else "" for pieces, fine in zip(ended, whole, strict=True)]

    def _heads(self, answer: str, random: np.random.Generator, flip: bool) -> list[Head]:
        other = flipped(answer) if flip else None
        return heads(answer if other is None else other, random, keep=0 if other is None else 1)

    def _free(self, records: Sequence[Record], randoms: Sequence[np.random.Generator]) -> list[str]:
        return self.answers([r.prompt for r in records], _seeds(randoms), self.hide_images)

    def answers(self, prompts: Sequence[Prompt], seeds: Sequence[int], hide_images: float) -> list[str]:
        """Whole answers."""
        options: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        said = self.generator(prompts, seeds, hide_images=hide_images, **options) if prompts else []
        return [answer.text.strip() for answer in said]


def _checked(record: Record, random: np.random.Generator) -> Record:
    images = [b for b in record.prompt if b.kind == "image"]
    if not images:
        raise Dropped("no image in the prompt")
    if not record.answer or not record.answer.strip():
        raise Dropped("no answer")
    for image in images:
        open_image(image)  # one that does not open drops its record here, and not all that the generator is asked with it
    return replace(record, answer=record.answer.strip())


def _ranked(
    records: Sequence[Record], randoms: Sequence[np.random.Generator], sampler: _Sampler, judge: PairJudge, share: float
) -> list[Result]:
    """Mixed-DPO's other half: a share of the records gets two answers of the model as it is, ranked by a judge."""
    ask = [at for at, random in enumerate(randoms) if random.random() < share]
    prompts = [records[at].prompt for at in ask]
    first = sampler.answers(prompts, _seeds([randoms[at] for at in ask]), 0.0)
    second = sampler.answers(prompts, _seeds([randoms[at] for at in ask]), 0.0)
    verdicts = decided(judge, list(zip(prompts, first, second, strict=True)), swap=True) if ask else []
    results: list[Result] = list(records)
    for at, a, b, won in zip(ask, first, second, verdicts, strict=True):
        if not a or not b or a == b:
            results[at] = Dropped("not two different answers")
        elif won is None:
            results[at] = Dropped("no verdict that holds in both orders")
        else:
            results[at] = _with_sides(records[at], *((a, b) if won else (b, a)), {"on_policy": True})
    return results


def _with_sides(record: Record, chosen: str, rejected: str, told: dict[str, Any]) -> Record:
    return record.having(told, chosen=chosen, rejected=rejected, told=told)


def _seeds(randoms: Sequence[np.random.Generator]) -> list[int]:
    return [int(random.integers(2**31)) for random in randoms]


def _pair(record: Record, random: np.random.Generator) -> Record:
    chosen, rejected = (answer_of(record.prompt, str(record.fields[side])) for side in ("chosen", "rejected"))
    return record.having(pair=Pair(record.id, record.prompt, chosen, rejected, meta=dict(record.fields["told"])))
