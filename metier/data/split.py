"""Groups -> splits: train, val and test, so that no group stands in two of them.

The order of the groups is that of SHA-256(seed|group): it depends on nothing else, so that a split is the same on
every machine, and new records move few old ones. Test is filled first, then val, each without exceeding what was
asked; a group that is too large is passed over, and where every group is too large the smallest is taken.

Stratified: each stratum (such as a label) first gets its share of a split, rounded down, in that order; what is still
missing is filled regardless of strata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from metier.data.alike import Digests, Ints, in_order, numbered
from metier.data.records import Record
from metier.errors import DataError

Size = int | float


def lots(records: Sequence[Record], seed: int) -> Ints:
    """The records' positions in an order that depends on the seed and on each record's place alone."""
    drawn = Digests()
    for record in records:
        drawn.draw(f"{seed}|{record.source.name}|{record.row_number}")
    return in_order(drawn.keys())


def number_groups(names: Iterable[str], seed: int) -> Ints:
    """[n]: for each record, of whose group the name is given, the group's number in the order that the seed draws."""
    drawn = Digests()
    for name in names:
        drawn.draw(f"{seed}|{name}")
    return numbered(drawn.keys())


def split_groups(sizes: Sequence[int], *, val: Size, test: Size, strata: Sequence[int] | None = None) -> list[str]:
    """Each group's split: `train`, `val` or `test`. `sizes`: its number of records, in the order of `number_groups`.

    `val` and `test` are a share or a number. `strata`: each group's stratum; absent, all are one.

    Raises `DataError` where fewer groups than asked-for splits exist, or nothing would be left to train on.
    """
    total = sum(sizes)
    wanted = {"test": _records(test, total), "val": _records(val, total)}
    asked = [name for name, count in wanted.items() if count]
    if len(sizes) < len(asked) + 1:
        raise DataError(
            f"{total} records are in {len(sizes)} group{'s' if len(sizes) != 1 else ''}, too few for "
            f"{' and '.join(['train', *reversed(asked)])}: each needs one group of its own",
            hint="records with the same group_id, or without one the same prompt, stay together, and so do their "
            "near-duplicates: give more data, raise `dedup.threshold` where texts are alike by their form alone, or "
            "set `data.val` or `data.test` to 0",
        )
    if sum(wanted.values()) >= total:
        raise DataError(
            f"`data.test` asks for {wanted['test']} and `data.val` for {wanted['val']} of {total} records: "
            "none would be left to train on",
            hint="ask for fewer, or for shares such as 0.1",
        )
    strata = strata or [0] * len(sizes)
    left, splits = list(range(len(sizes))), ["train"] * len(sizes)
    for position, name in enumerate(asked):
        needed_later = len(asked) - position  # one group for each later split and one for train
        for group in _fill(left, sizes, wanted[name], len(left) - needed_later, strata):
            splits[group] = name
        left = [group for group in left if splits[group] == "train"]
    return splits


def _records(size: Size, total: int) -> int:
    if isinstance(size, int):
        return size
    return max(1, round(size * total))


def _fill(groups: list[int], sizes: Sequence[int], wanted: int, most: int, strata: Sequence[int]) -> Iterable[int]:
    of_stratum = Counter[int]()
    for group in groups:
        of_stratum[strata[group]] += sizes[group]
    total = of_stratum.total()
    left = {stratum: wanted * count // total for stratum, count in of_stratum.items()}
    chosen: dict[int, None] = {}
    count = 0
    for is_stratified in (True, False):
        for group in groups:
            if len(chosen) == most or count == wanted:
                break
            stratum = strata[group]
            fits = not is_stratified or sizes[group] <= left[stratum]
            if group not in chosen and fits and count + sizes[group] <= wanted:
                chosen[group] = None
                count += sizes[group]
                left[stratum] -= sizes[group]
    return chosen or [min(groups, key=sizes.__getitem__)]
