"""What an answer looks like, whatever it says: the features by which a model can tell two sides apart without reading them."""

from __future__ import annotations

import re
from collections.abc import Callable

_APOLOGY = r"(i['’]?m|i am|we['’]?re) (very |so |really )?sorry|sorry|i apologi[sz]e|unfortunately"
_REFUSAL = r"i (can['’]?t|cannot|can not|won['’]?t|will not|am not able|am unable)|i['’]m (not able|unable)|as an ai"
_AGREEMENT = r"sure|certainly|of course|absolutely|definitely|great question|i['’]d be (happy|glad)|here('s| is| are)\b"


def _found(pattern: str, least: int = 1) -> Callable[[str], bool]:
    """Whether a pattern occurs at least so many times."""
    compiled = re.compile(pattern, re.MULTILINE | re.IGNORECASE)
    return lambda words: sum(1 for _, _ in zip(compiled.finditer(words), range(least), strict=False)) == least


FEATURES: dict[str, Callable[[str], bool]] = {
    "headings": _found(r"^#{1,6} \S"),
    "bullets": _found(r"^\s*[-*•] +\S", 2),
    "numbered list": _found(r"^\s*\d+[.)] +\S", 2),
    "bold": _found(r"\*\*[^*\n]+\*\*"),
    "code": _found(r"```|^ {4}\S.*\n {4}\S"),
    "table": _found(r"^\s*\|.*\|\s*$", 2),
    "link": _found(r"https?://"),
    "LaTeX": _found(r"\\\(|\\\[|\\begin\{|\$\$|\\frac"),
    "emoji": _found("[\U0001f300-\U0001faff\u2600-\u27bf]"),
    "several paragraphs": _found(r"\S\n\s*\n\S"),
    "exclamation mark": _found("!"),
    "refusal at the start": _found(rf"\A\W*({_REFUSAL})"),
    "apology at the start": _found(rf"\A\W*({_APOLOGY})"),
    "agreement at the start": _found(rf"\A\W*({_AGREEMENT})"),
    "speaks of itself as an AI": _found(r"\bas an? (ai|artificial|language model)|\bi['’ a]*m an? (ai|language model)"),
    "question at the end": _found(r"\?[\s\"')*]*\Z"),
    "unfinished end": _found(r"[^\s.!?…。！？:;\"'’”)\]}>`*|_~][\s]*\Z"),
    "starts in lower case": lambda words: words.lstrip()[:1].islower(),
    "white space at the ends": lambda words: words != words.strip(),
    "letters beyond ASCII": _found(r"[^\x00-\x7f–—‘’“”…•]"),
}
