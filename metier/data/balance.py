"""Training records -> which are left out, repeated or weighted, and how many general instructions are mixed in.

Only the train split is touched, after the split: repeating first and splitting then puts copies of one record on both
sides. Which records are chosen goes by SHA-256(seed|record), so that it depends on nothing else.

A record's weight is its file's weight times, with `oversample`, what its label is short of the most frequent one. The
records of one file and label share their weight exactly: of 10 records with weight 1.5 five are repeated once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeVar

from metier.data.records import Record
from metier.data.split import lots
from metier.errors import DataError, did_you_mean
from metier.recipe import BalanceConfig

Key = TypeVar("Key", bound=Hashable)
LEFT_OUT = "left out by balance"
NOT_NEEDED = "not needed for balance.general_share"


def check_balance(config: BalanceConfig, names: list[str], task: str) -> None:
    """Raises `DataError` for a setting that would do nothing: weights of no file, classes where there are none."""
    if unknown := [name for name in config.sources if name not in names]:
        raise DataError(
            f"`balance.sources`: no source is called `{unknown[0]}`{did_you_mean(unknown[0], names)}",
            hint=f"there is {', '.join(names[:10])}",
        )
    if config.classes != "natural" and task != "classification":
        raise DataError(
            f"`balance.classes` is {config.classes}, but the answers were taken for text, not for labels",
            hint="set `data.task: classification` if they are labels, or leave `balance.classes` out",
        )


def left_out(train: list[Record], config: BalanceConfig, *, task: str, seed: int) -> list[Record]:
    """The training records that the files' weights below 1, or undersampling, leave out."""
    gone: list[Record] = []
    by_file = _by(train, lambda record: record.source.name) if config.sources else {}
    for name, weight in config.sources.items():
        for some in _by(by_file.get(name, []), lambda record: _label(record, task)).values():
            gone += shuffled(some, seed)[round(min(1.0, weight) * len(some)) :]
    if config.classes != "undersample" or task != "classification":
        return gone
    dropped = set(gone)
    by_label = _by([record for record in train if record not in dropped], lambda record: record.answer)
    most = config.limit * min(map(len, by_label.values()))
    for some in by_label.values():
        gone += shuffled(some, seed)[most:]
    return gone


def repeated(train: list[Record], config: BalanceConfig, *, task: str, seed: int) -> list[Record]:
    """Copies of training records, so that each is seen as often as it weighs, at most `config.limit` times."""
    of_label = Counter(_label(record, task) for record in train)
    largest = max(of_label.values(), default=0)
    made: list[Record] = []
    for (name, label), some in _by(train, lambda record: (record.source.name, _label(record, task))).items():
        weight = max(1.0, config.sources.get(name, 1.0))
        if config.classes == "oversample":
            weight *= largest / of_label[label]
        extra = round((min(weight, config.limit) - 1) * len(some))
        order = shuffled(some, seed) if extra else []
        for number in range(extra):
            record = order[number % len(order)]
            copy = number // len(order) + 1
            made.append(record.variant(None, method="repeat", number=copy))
    return made


def general_excess(general: list[Record], number: int, config: BalanceConfig, *, seed: int) -> list[Record]:
    """Those general instructions that are more than their share beside `number` training records."""
    wanted = round(number * config.general_share / (1 - config.general_share))
    return shuffled(general, seed)[wanted:]


def class_weights(train: list[Record], config: BalanceConfig, *, task: str) -> dict[str, float]:
    """Label -> how much its training records count in the loss, where `config` asks for weights, or else nothing.

    Number of records / (number of labels x records of the label), as in King and Zeng (2001): their mean over the
    records is 1, and 1 everywhere when the labels are even. No more than `config.limit`.
    """
    if config.classes != "weight" or task != "classification":
        return {}
    counts = Counter(record.answer for record in train)
    total = sum(counts.values())
    return {
        label: min(float(config.limit), round(total / (len(counts) * count), 4))
        for label, count in sorted(counts.items())
    }


def _label(record: Record, task: str) -> str:
    return record.answer if task == "classification" else ""


def _by(records: list[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    grouped: dict[Key, list[Record]] = {}
    for record in records:
        grouped.setdefault(key(record), []).append(record)
    return grouped


def shuffled(records: list[Record], seed: int) -> list[Record]:
    """In an order that depends on the seed and on each record's place alone."""
    return [records[position] for position in lots(records, seed).tolist()]
