"""Groups -> splits: train, val and test, so that no group stands in two of them.

The order of the groups is that of SHA-256(seed|group): it depends on nothing else, so that a split is the same on
every machine, and new records move few old ones. Test is filled first, then val, each without exceeding what was
asked; a group that is too large is passed over, and where every group is too large the smallest is taken.

Stratified: each stratum (such as a label) first gets its share of a split, rounded down, in that order; what is still
missing is filled regardless of strata.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from metier.errors import DataError

Size = int | float


def split_groups(
    sizes: dict[str, int], *, val: Size, test: Size, seed: int, strata: dict[str, str] | None = None
) -> dict[str, str]:
    """Group -> `train`, `val` or `test`. `sizes` counts each group's records; `val` and `test` are a share or a number.

    `strata`: group -> its stratum; absent, all are one.

    Raises `DataError` where fewer groups than asked-for splits exist, or nothing would be left to train on.
    """
    total = sum(sizes.values())
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
    left = sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}|{group}".encode()).digest())
    splits = dict.fromkeys(sizes, "train")
    for position, name in enumerate(asked):
        needed_later = len(asked) - position  # one group for each later split and one for train
        chosen = _fill(left, sizes, wanted[name], len(left) - needed_later, strata or {})
        splits.update(dict.fromkeys(chosen, name))
        taken = set(chosen)
        left = [group for group in left if group not in taken]
    return splits


def _records(size: Size, total: int) -> int:
    if isinstance(size, int):
        return size
    return max(1, round(size * total))


def _fill(groups: list[str], sizes: dict[str, int], wanted: int, most: int, strata: dict[str, str]) -> list[str]:
    of_stratum = Counter[str]()
    for group in groups:
        of_stratum[strata.get(group, "")] += sizes[group]
    total = of_stratum.total()
    left = {stratum: wanted * count // total for stratum, count in of_stratum.items()}
    chosen: dict[str, None] = {}
    count = 0
    for is_stratified in (True, False):
        for group in groups:
            if len(chosen) == most or count == wanted:
                break
            stratum = strata.get(group, "")
            fits = not is_stratified or sizes[group] <= left[stratum]
            if group not in chosen and fits and count + sizes[group] <= wanted:
                chosen[group] = None
                count += sizes[group]
                left[stratum] -= sizes[group]
    return list(chosen) or [min(groups, key=lambda group: sizes[group])]
