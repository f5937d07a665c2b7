"""Groups -> splits: train, val and test, so that no group stands in two of them.

The order of the groups is that of SHA-256(seed|group): it depends on nothing else, so that a split is the same on
every machine, and new records move few old ones. Test is filled first, then val, each without exceeding what was
asked; a group that is too large is passed over, and where every group is too large the smallest is taken.
"""

from __future__ import annotations

import hashlib

from metier.errors import DataError

Size = int | float


def split_groups(sizes: dict[str, int], *, val: Size, test: Size, seed: int) -> dict[str, str]:
    """Group -> `train`, `val` or `test`. `sizes` counts each group's records; `val` and `test` are a share or a number.

    Raises `DataError` where fewer groups than asked-for splits exist, or nothing would be left to train on.
    """
    total = sum(sizes.values())
    wanted = {"test": _records(test, total), "val": _records(val, total)}
    asked = [name for name, count in wanted.items() if count]
    if len(sizes) < len(asked) + 1:
        raise DataError(
            f"{total} records are in {len(sizes)} group{'s' if len(sizes) != 1 else ''}, too few for "
            f"{' and '.join(['train', *reversed(asked)])}: each needs one group of its own",
            hint="records with the same group_id, or without one the same prompt, stay together; give more data, "
            "or set `data.val` or `data.test` to 0",
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
        chosen = _fill(left, sizes, wanted[name], len(left) - needed_later)
        splits.update(dict.fromkeys(chosen, name))
        taken = set(chosen)
        left = [group for group in left if group not in taken]
    return splits


def _records(size: Size, total: int) -> int:
    if isinstance(size, int):
        return size
    return max(1, round(size * total))


def _fill(groups: list[str], sizes: dict[str, int], wanted: int, most: int) -> list[str]:
    chosen: list[str] = []
    count = 0
    for group in groups:
        if len(chosen) == most or count == wanted:
            break
        if count + sizes[group] <= wanted:
            chosen.append(group)
            count += sizes[group]
    return chosen or [min(groups, key=lambda group: sizes[group])]
