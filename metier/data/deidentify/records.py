"""Records -> rewritten records, the manifest's `privacy`, and the keyed hashes of what was taken out.

prepare makes one `Privacy` and hands it every row (columns that are identifiers as a whole) and then all records (their
texts). A group_id becomes its keyed hash. No removed value is kept, logged or shown: subjects.parquet holds hashes
that tell nothing without the key.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from metier.data.deidentify.detect import detect
from metier.data.deidentify.models import check_recognizers
from metier.data.deidentify.operators import Context, stand_in
from metier.data.deidentify.policy import NONE, TYPES, Policy, load_policy
from metier.data.deidentify.residual import planted_recall, small_groups, suspicions
from metier.data.deidentify.rewrite import rewrite
from metier.data.lines import Row
from metier.data.partitions import Workers, parts
from metier.data.records import Record, Removed
from metier.errors import DataError, RecipeError, did_you_mean
from metier.keys import key_fingerprint, keyed_hash, load_key
from metier.recipe import PrivacyConfig

LOOKED_AT = 2_000
PART_LOOKED_AT = 250


Suspicion = tuple[int, int, str]
Rewritten = tuple[list[str], Removed]  # the texts of a record, and what was in them


@dataclass
class Privacy:
    """The policy at work on one data set; `policy` is None where nothing is to be rewritten."""

    config: PrivacyConfig
    name: str
    policy: Policy | None
    key: bytes
    seed: int
    groups: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def rewrite_row(self, row: Row) -> Row:
        """The row with its identifier columns replaced, and their values in its other columns too."""
        if self.config.quasi_identifiers and not row.problem:
            self.groups[tuple(str(row.fields.get(name, "")) for name in self.config.quasi_identifiers)] += 1
        if self.policy is None or not self.config.columns or row.problem:
            return row
        fields = dict(row.fields)
        for column, entity_type in self.config.columns.items():
            value = str(fields.get(column) or "").strip()
            if not value:
                continue
            new = stand_in(value, entity_type, self.policy, Context(self.key, subject=str(row.number)))
            for name, text in fields.items():
                if name == column:
                    fields[name] = new
                elif isinstance(text, str) and len(value) > 1:
                    fields[name] = text.replace(value, new)
        return dataclasses.replace(row, fields=fields)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises `DataError` where the recipe names a column that no source has."""
        for column in (*self.config.columns, *self.config.quasi_identifiers):
            if column not in columns:
                raise DataError(
                    f"`privacy`: no source has a column `{column}`{did_you_mean(column, list(columns))}",
                    hint="`metier inspect` shows the columns",
                )

    def rewrite_records(
        self, records: list[Record], workers: Workers, progress: Callable[[str], None]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Rewrites the records where they stand; returns the manifest's entry, and the records for a person to read."""
        if self.policy is None:
            return self._look(records, progress), []
        progress(f"taking out personal data ({self.name})")
        touched, counts = 0, Counter[str]()
        for record, (texts, removed) in zip(records, self._rewritten(records, workers), strict=True):
            counts.update(entity_type for entity_type, _ in removed)
            touched += bool(removed)
            messages = [{**turn, "content": text} for turn, text in zip(record.messages, texts, strict=True)]
            group_id = None if record.group_id is None else keyed_hash(record.group_id, self.key)
            record.rewrite(messages, group_id, removed)
        looked_at = self._suspected(records, workers)
        planted = next(workers.map(planted_recall, [[_text(record) for record, _ in looked_at]], self.seed))
        report = self._report(looked_at, counts, touched) | {"planted": planted} | self._k_anonymity()
        progress(
            f"{sum(counts.values()):,} identifiers in {touched:,} of {len(records):,} records were replaced; "
            f"a second look suspects {sum(report['suspected'].values()):,} more in {report['looked_at']:,} records"
        )
        return report, self._review(looked_at)

    def _rewritten(self, records: list[Record], workers: Workers) -> Iterator[Rewritten]:
        assert self.policy is not None
        asked = (
            [([m["content"] for m in r.messages], r.group_id or f"{r.source.name}:{r.row.number}") for r in part]
            for part in parts(records)
        )
        done = workers.map(rewrite_part, asked, self.policy, self.key, self.config.recognizers)
        return (rewritten for part in done for rewritten in part)

    def _suspected(self, records: list[Record], workers: Workers) -> list[tuple[Record, list[Suspicion]]]:
        """A sample of the rewritten records, and what a second look suspects in each."""
        sample = self._sample(records)
        texts = [_text(record) for record in sample]
        found = workers.map(suspect_part, parts(texts, PART_LOOKED_AT), self.key)
        return list(zip(sample, (some for part in found for some in part), strict=True))

    def _look(self, records: list[Record], progress: Callable[[str], None]) -> dict[str, Any]:
        """With no policy: what would have been found, in a sample."""
        texts = [_text(record) for record in self._sample(records)]
        quiet = {"TITLE", "NRP", "COUNTRY", "TIME", "AGE", "LOCATION", "ORGANIZATION", "DATE", "URL"}
        counts = Counter(s.entity_type for text in texts for s in detect(text) if s.entity_type not in quiet)
        if counts:
            shown = ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common(5))
            advice = "" if self.config.policy == NONE else "; set `privacy.policy`, or `none` to say so"
            progress(
                f"privacy: nothing was taken out; in {len(texts):,} records looked at, "
                f"{sum(counts.values()):,} words look like identifiers of people ({shown}){advice}"
            )
        report = {"policy": self.name, "looked_at": len(texts), "suspected_by_type": dict(sorted(counts.items()))}
        return report | self._k_anonymity()

    def _report(
        self, looked_at: list[tuple[Record, list[Suspicion]]], counts: Counter[str], touched: int
    ) -> dict[str, Any]:
        assert self.policy is not None
        suspected = Counter(kind for _, found in looked_at for _, _, kind in found)
        classes = self.policy.answered(counts)
        kept = sorted({kind for entry in classes for kind in entry.get("kept", ())})
        standing = "pseudonymised: whoever holds the key can link" if self.policy.needs_key else "de-identified"
        return {
            "policy": self.name,
            "law": self.policy.law,
            "law_in": self.policy.law_in,
            "standing": f"not {standing}, for the recipe keeps {', '.join(kept)}" if kept else standing,
            "replaced": {
                kind: {"count": n, "operator": self.policy.operators[kind]} for kind, n in sorted(counts.items())
            },
            "records_touched": touched,
            "key_fingerprint": key_fingerprint(self.key),
            "classes": classes,
            "looked_at": len(looked_at),
            "suspected": dict(sorted(suspected.items())),
        }

    def _k_anonymity(self) -> dict[str, Any]:
        if not self.config.quasi_identifiers:
            return {}
        return {"quasi_identifiers": self.config.quasi_identifiers, "k_anonymity": small_groups(self.groups)}

    def _sample(self, records: list[Record]) -> list[Record]:
        return records if len(records) <= LOOKED_AT else random.Random(self.seed).sample(records, LOOKED_AT)

    def _review(self, looked_at: list[tuple[Record, list[Suspicion]]]) -> list[dict[str, Any]]:
        """Rewritten records for a person: those that the second look suspects first, then by chance."""
        rng = random.Random(self.seed)
        marked = sorted(rng.sample(looked_at, len(looked_at)), key=lambda item: -len(item[1]))
        half = [item for item in marked if item[1]][: self.config.review // 2]
        rest = marked[len(half) :]
        rng.shuffle(rest)
        return [
            {"source_file": r.source.name, "source_row": r.row.number, "messages": r.messages, "suspected": found}
            for r, found in (half + rest)[: self.config.review]
        ]


def open_privacy(config: PrivacyConfig, *, domain_policy: str | None, seed: int) -> Privacy:
    """The recipe's policy, ready for the rows.

    Raises `RecipeError` for a policy, type, operator or recognizer that there is not, `RunError` where the key cannot
    be read.
    """
    name = config.policy if config.policy != "auto" else domain_policy or NONE
    for column, entity_type in config.columns.items():
        if entity_type not in TYPES:
            near = did_you_mean(entity_type, TYPES)
            raise RecipeError(
                f"privacy.columns: `{column}` has no known type `{entity_type}`{near}", hint=", ".join(TYPES)
            )
    if name == NONE:
        return Privacy(config, name, None, b"", seed)
    check_recognizers(config.recognizers)
    policy = load_policy(name, dict(config.operators))
    if missing := [t for t in config.columns.values() if t not in policy.operators]:
        raise RecipeError(f"privacy.columns: the policy `{policy.name}` has no operator for {', '.join(missing)}")
    return Privacy(config, policy.name, policy, load_key(), seed)


def policy_key(config: PrivacyConfig, domain_policy: str | None) -> dict[str, str]:
    """What of the policy and of the key changes the data set, for the stage's key; neither can be read from it."""
    privacy = open_privacy(config, domain_policy=domain_policy, seed=0)
    if privacy.policy is None:
        return {}
    return {"policy": privacy.policy.text, "key": key_fingerprint(privacy.key)}


def rewrite_part(
    asked: Sequence[tuple[list[str], str]], policy: Policy, key: bytes, more: Sequence[str] = ()
) -> list[Rewritten]:
    """(texts, subject) of some records -> their rewritten texts, and type and keyed hash of each replaced value."""
    done = []
    for texts, subject in asked:
        rewritten = rewrite(texts, policy, key=key, subject=subject, more=more)
        hashes = tuple(
            (span.entity_type, keyed_hash(text[span.start : span.end], key))
            for text, (_, spans) in zip(texts, rewritten, strict=True)
            for span in spans
        )
        done.append(([text for text, _ in rewritten], hashes))
    return done


def suspect_part(texts: Sequence[str], key: bytes) -> list[list[Suspicion]]:
    """What a second look suspects in each text."""
    return [suspicions(text, key) for text in texts]


def review_lines(review: list[dict[str, Any]]) -> bytes:
    """privacy_review.jsonl."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in review).encode()


def _text(record: Record) -> str:
    return "\n".join(m["content"] for m in record.messages)
