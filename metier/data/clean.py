"""Records -> tidy records, the ones that are left out, and what each rule did.

`clean_record` looks at one record alone, so that it can run over any partition; `clean` runs it over all and then
looks for what only all of them show: lines that many share, and equal prompts with different labels. A rule that is
off, or that keeps what it finds, is counted all the same where the count is a warning.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from metier.data.alike import Digests, digest, groups_of
from metier.data.normalize import apply_edits, find_edits, holds_html, is_mojibake
from metier.data.records import Message, Record, Rejected, Rejection, language_of, same_input
from metier.errors import DataError
from metier.recipe import CleanConfig

EXAMPLES = 5
BOILERPLATE_RECORDS = 20
BOILERPLATE_SHARE = 0.1
BOILERPLATE_CHARS = 15
# In the order of the card: what changes text, what is found, what leaves records out.
RULES = ("control", "whitespace", "width", "html", "script", "boilerplate", "mojibake", "contradictions")
LEFT_OUT_BY = ("min_chars", "max_chars", "languages")


@dataclass(slots=True)
class Places:
    """How many, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        self.count += 1
        if len(self.first) < EXAMPLES:
            self.first.append(f"{record.source.name}:{record.row_number}")


@dataclass
class Cleaned:
    """`found` has for each rule the places (file and row) of the records that it concerned."""

    records: list[Record]
    rejected: list[Rejection] = field(default_factory=list)
    found: dict[str, Places] = field(default_factory=lambda: {rule: Places() for rule in (*RULES, *LEFT_OUT_BY)})

    def add(self, part: Cleaned) -> None:
        """What was made of some more records; those that were rejected are the caller's."""
        self.records += part.records
        for rule, places in part.found.items():
            self.found[rule].count += places.count
            self.found[rule].first = (self.found[rule].first + places.first)[:EXAMPLES]

    def report(self, config: CleanConfig) -> dict[str, dict[str, Any]]:
        """For the manifest: each rule's setting, the number of records and the first of them."""
        return {
            rule: {"setting": _setting(getattr(config, rule)), "records": places.count, "examples": places.first}
            for rule, places in self.found.items()
        }


class _LeftOut(Rejected):
    """Rejected by a rule of the recipe."""

    def __init__(self, rule: str, problem: str) -> None:
        super().__init__(problem)
        self.rule = rule


def clean(records: list[Record], config: CleanConfig) -> Cleaned:
    """Every rule but the one on contradictions. Raises `DataError` where a rule needs a package that is not there."""
    cleaned = clean_part(records, config)
    find_boilerplate(cleaned, config)
    return cleaned


def clean_part(records: list[Record], config: CleanConfig) -> Cleaned:
    """The rules that look at one record alone, over any part of the records."""
    cleaned = Cleaned([])
    for record in records:
        try:
            tidy, rules = clean_record(record, config)
        except Rejected as error:
            cleaned.rejected.append(Rejection(record.source, record.row, str(error)))
            if isinstance(error, _LeftOut):
                cleaned.found[error.rule].add(record)
            continue
        cleaned.records.append(tidy)
        for rule in rules:
            cleaned.found[rule].add(record)
    return cleaned


def clean_record(record: Record, config: CleanConfig) -> tuple[Record, set[str]]:
    """The record with tidy messages, and the rules that changed it or found something. Raises `Rejected`."""
    rules: set[str] = set()
    messages: list[Message] = []
    given = record.messages
    for message in given:
        content = message["content"]
        edits = find_edits(content, config)
        rules.update(edit.rule for edit in edits)
        text = apply_edits(content, edits) if edits else content
        if is_mojibake(text):  # before the script: 錕斤拷 is no sign of anything
            rules.add("mojibake")
        if config.script != "keep" and (converted := _converter(config.script).convert(text)) != text:
            rules.add("script")
            text = converted
        if edits and message["role"] != "text":
            text = text.strip()
        if not text.strip():
            raise Rejected(f"{'answer' if message is given[-1] else 'prompt'} is empty after cleaning")
        if not config.html and holds_html(text):
            rules.add("html")
        messages.append({**message, "content": text})
    prompt = next(m["content"] for m in messages if m["role"] in ("user", "text"))
    tidy = record
    if rules:
        tidy = Record(record.source, record.row, messages, record.group_id, prompt, method=record.method)
    _refuse(tidy, rules, config)
    return tidy, rules


def contradictions(records: list[Record], policy: str, cleaned: Cleaned) -> list[Record]:
    """What `policy` takes out of the records of an equal input and different labels, none of a test file's.

    All such records are listed in `cleaned`.
    """
    inputs = Digests()
    for record in records:
        inputs.add(same_input(record))
    out: list[Record] = []
    for group in ([records[i] for i in some] for some in groups_of(inputs.keys())):
        labels = Counter(record.answer for record in group)
        if len(labels) < 2:
            continue
        for record in group:
            cleaned.found["contradictions"].add(record)
        (first, most), (_, second) = labels.most_common(2)
        winner = first if policy == "majority" and most > second else None
        if policy != "keep":
            out += [record for record in group if record.answer != winner and not record.source.is_test]
    return out


def _refuse(record: Record, rules: set[str], config: CleanConfig) -> None:
    if "mojibake" in rules and config.mojibake == "reject":
        raise _LeftOut("mojibake", "text that was read in a wrong encoding (mojibake)")
    if config.min_chars and len(record.prompt) < config.min_chars:
        raise _LeftOut("min_chars", f"shorter than clean.min_chars ({config.min_chars})")
    if config.max_chars and sum(len(m["content"]) for m in record.messages) > config.max_chars:
        raise _LeftOut("max_chars", f"longer than clean.max_chars ({config.max_chars})")
    if config.languages and (language := language_of(record.messages)) not in config.languages:
        raise _LeftOut("languages", f"its language is {language}, not {' or '.join(config.languages)}")


def find_boilerplate(cleaned: Cleaned, config: CleanConfig) -> None:
    """Counts first and last lines, in texts of several lines, that many records share; `remove` takes them out."""
    keys = array("Q")  # not the lines, which would be most of some texts
    for record in cleaned.records:
        keys.extend({_key(line) for message in record.messages for line in _ends(message)})
    least = max(BOILERPLATE_RECORDS, BOILERPLATE_SHARE * len(cleaned.records))
    different, counts = np.unique(np.frombuffer(keys, dtype=np.uint64), return_counts=True)
    shared = set(different[counts >= least].tolist())
    if not shared:
        return
    for record in cleaned.records:
        if not any(_key(line) in shared for message in record.messages for line in _ends(message)):
            continue
        cleaned.found["boilerplate"].add(record)
        if config.boilerplate == "remove":
            messages = [{**message, "content": _without(message, shared)} for message in record.messages]
            record.rewrite(messages, record.group_id, record.removed)


def _ends(message: Message) -> list[str]:
    """The first and the last line of a text of several lines, where they are long enough to be anything."""
    if message["role"] == "system" or "\n" not in message["content"]:
        return []
    lines = message["content"].strip().split("\n")
    return [end for line in (lines[:1] + lines[-1:]) if len(lines) > 1 and len(end := line.strip()) > BOILERPLATE_CHARS]


def _key(line: str) -> int:
    return int.from_bytes(digest(line)[:8])


def _without(message: Message, shared: set[int]) -> str:
    """The text without such ends; one line always stays."""
    content = message["content"]
    while any(_key(line) in shared for line in _ends({**message, "content": content})):
        first, _, rest = content.strip().partition("\n")
        content = rest.strip() if _key(first.strip()) in shared else content.strip().rpartition("\n")[0].strip()
    return content


def _setting(value: Any) -> Any:
    """As the card shows it: a rule without a value is off."""
    if isinstance(value, list):
        value = ", ".join(value)
    return value or False


@lru_cache(maxsize=2)
def _converter(script: str) -> Any:
    try:
        import opencc
    except ImportError:
        raise DataError("`clean.script` needs the package opencc", hint="pip install 'metier[chinese]'") from None
    return opencc.OpenCC("t2s" if script == "simplified" else "s2t")
