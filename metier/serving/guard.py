"""What leaves the server is looked at: red-line requests refused, personal data redacted, the domain's notice attached.

A domain's pack (metier/domains/NAME.yaml) has, by language (en, zh): `red_lines`, patterns of requests that no
model may answer; `refusals`, what is said instead; `notices`, what stands under every answer. Personal data is
found by the function that the caller gives, the one that cleaned the training data. Each part can be switched
off (the recipe's `serve`), and what acted is told with the answer.

Limits: patterns see wording, not intent; a refusal can be talked around, so it is a fence and no proof.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from metier.domains import Domain
from metier.recipe import ServeConfig

# Text -> the text without personal data, and the entity type of each piece that went.
Redact = Callable[[str], tuple[str, list[str]]]
_CHINESE = re.compile(r"[\u3400-\u9fff]")
# Where a text may be cut without cutting a name or a number: behind a sentence or a line.
_SENTENCE_END = re.compile(r"(?<=[。！？；\n])|(?<=[.!?;])(?=\s)")
# A text without a sentence's end is looked at when it has grown to this many characters, but for its last ones.
MAX_HELD, OVERLAP = 400, 80
# Characters of a request that the red lines are tried on at once.
PART, PART_OVERLAP = 2000, 200


@dataclass
class Acts:
    """What the guard did to one answer, as the response tells it."""

    redacted: Counter[str] = field(default_factory=Counter)
    notice: str | None = None
    refused: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"redacted": dict(self.redacted), "notice": self.notice, "refused": self.refused}


@dataclass(frozen=True)
class Guard:
    """The guard of one model. Without a domain there is nothing to refuse or to attach."""

    config: ServeConfig = field(default_factory=ServeConfig)
    domain: Domain | None = None
    redact: Redact | None = None

    @property
    def redacts(self) -> bool:
        return self.config.redact and self.redact is not None

    def refusal(self, request: str, acts: Acts) -> str | None:
        """What to say instead of an answer, when `request` crosses a red line of the domain."""
        if self.domain is None or not self.config.refuse:
            return None
        patterns = [pattern for patterns in self.domain.red_lines.values() for pattern in patterns]
        if not any(re.search(pattern, part, re.IGNORECASE) for part in _parts(request) for pattern in patterns):
            return None
        acts.refused = self.domain.name
        return _in_language(self.domain.refusals, request)

    def notice(self, request: str, answer: str, acts: Acts) -> str:
        """What is to stand behind `answer`: the domain's notice, unless the answer has it."""
        if self.domain is None or not self.config.notice or not self.domain.notices:
            return ""
        text = _in_language(self.domain.notices, request).strip()
        acts.notice = self.domain.name
        return "" if text in answer else f"\n\n{text}"

    def redactor(self, acts: Acts) -> Redactor:
        """For one answer's text, as it comes."""
        return Redactor(self.redact if self.redacts else None, acts)

    def as_json(self) -> dict[str, Any]:
        """How the guard is set, for the list of models."""
        return {
            "domain": self.domain.name if self.domain else None,
            "redact": self.redacts,
            "notice": self.domain is not None and self.config.notice,
            "refuse": self.domain is not None and self.config.refuse,
        }


class Redactor:
    """Lets a text through sentence by sentence, each without its personal data; without `redact`, at once."""

    def __init__(self, redact: Redact | None, acts: Acts) -> None:
        self._redact = redact
        self._acts = acts
        self._held = ""

    def push(self, text: str) -> str:
        """What may be shown now."""
        if self._redact is None:
            return text
        self._held += text
        ends = [match.start() for match in _SENTENCE_END.finditer(self._held) if match.start()]
        if ends:
            return self._release(ends[-1])
        if len(self._held) > MAX_HELD:
            # Cut at a space, so that no word is halved; a language without spaces is cut where it is.
            space = self._held.rfind(" ", 0, MAX_HELD - OVERLAP)
            return self._release(space if space > 0 else MAX_HELD - OVERLAP)
        return ""

    def end(self) -> str:
        """What was still held back."""
        return self._release(len(self._held)) if self._redact else ""

    def _release(self, end: int) -> str:
        assert self._redact is not None
        text, self._held = self._held[:end], self._held[end:]
        clean, found = self._redact(text)
        self._acts.redacted.update(found)
        return clean


def _parts(request: str) -> Iterator[str]:
    """A request in overlapping parts, so that a pattern's time stays bounded; full-width letters become plain."""
    plain = unicodedata.normalize("NFKC", request)
    for start in range(0, max(len(plain) - PART_OVERLAP, 1), PART - PART_OVERLAP):
        yield plain[start : start + PART]


def _in_language(texts: Mapping[Any, str], request: str) -> str:
    """The text in the request's language: Chinese when it has Chinese characters."""
    language = "zh" if _CHINESE.search(request) else "en"
    return texts.get(language) or next(iter(texts.values()), "")
