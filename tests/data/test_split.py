"""Tries to make a group leak across splits, a split come out empty, or the order depend on anything but the seed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.data.split import number_groups, split_groups
from metier.errors import DataError


def split(sizes: dict[str, int], *, val: float, test: float, seed: int) -> dict[str, str]:
    """Group -> its split, of groups by name."""
    numbers = number_groups(sizes, seed).tolist()
    in_order = [size for _, size in sorted(zip(numbers, sizes.values(), strict=True))]
    splits = split_groups(in_order, val=val, test=test)
    return {name: splits[number] for name, number in zip(sizes, numbers, strict=True)}


SIZES = st.dictionaries(st.text(max_size=5), st.integers(1, 30), min_size=3, max_size=60)
SHARE = st.one_of(st.just(0), st.floats(0.01, 0.45), st.integers(1, 5))


@settings(max_examples=150, deadline=None)
@given(SIZES, SHARE, SHARE, st.integers(0, 5))
def test_every_asked_split_has_groups_and_does_not_exceed_what_was_asked(
    sizes: dict[str, int], val: float, test: float, seed: int
) -> None:
    total = sum(sizes.values())
    try:
        splits = split(sizes, val=val, test=test, seed=seed)
    except DataError as error:
        assert "none would be left" in error.message
        return
    assert set(splits) == set(sizes)
    counts = {name: [sizes[g] for g, s in splits.items() if s == name] for name in ("train", "val", "test")}
    assert counts["train"]
    for name, asked in (("val", val), ("test", test)):
        wanted = asked if isinstance(asked, int) else max(1, round(asked * total))
        assert bool(counts[name]) == bool(wanted)
        assert sum(counts[name]) <= wanted or len(counts[name]) == 1
    assert split(dict(reversed(sizes.items())), val=val, test=test, seed=seed) == splits


def test_groups_of_one_give_exactly_what_was_asked() -> None:
    splits = list(split({str(i): 1 for i in range(1000)}, val=0.1, test=150, seed=0).values())
    assert [splits.count(name) for name in ("train", "val", "test")] == [750, 100, 150]


def test_another_seed_gives_another_split() -> None:
    sizes = {str(i): 1 for i in range(100)}
    assert split(sizes, val=0.1, test=0.1, seed=0) != split(sizes, val=0.1, test=0.1, seed=1)


def test_a_giant_group_stays_in_train() -> None:
    for seed in range(20):
        sizes = {"giant": 900, **{str(i): 1 for i in range(100)}}
        assert split(sizes, val=0.05, test=0.05, seed=seed)["giant"] == "train"


def test_each_asked_split_gets_a_group_even_when_the_small_ones_would_fit_together() -> None:
    for seed in range(20):
        splits = split({"a": 1, "b": 1, "c": 98}, val=10, test=10, seed=seed)
        assert sorted(splits.values()) == ["test", "train", "val"] and splits["c"] == "train"


def test_new_records_move_few_old_ones() -> None:
    before = split({str(i): 1 for i in range(1000)}, val=0.1, test=0.1, seed=0)
    after = split({str(i): 1 for i in range(1010)}, val=0.1, test=0.1, seed=0)
    assert sum(after[group] != split for group, split in before.items()) <= 20


def test_size_zero_leaves_a_split_empty() -> None:
    assert set(split({"a": 1, "b": 1}, val=0, test=0, seed=0).values()) == {"train"}
    assert "test" not in split({"a": 1, "b": 1}, val=1, test=0, seed=0).values()


@pytest.mark.parametrize(
    ("sizes", "val", "test", "sentence"),
    [
        ({"a": 50, "b": 50}, 0.1, 0.1, "100 records are in 2 groups, too few for train and val and test"),
        ({"a": 50}, 0.1, 0, "100 records|50 records are in 1 group, too few for train and val"),
        ({str(i): 1 for i in range(300)}, 100, 200, "asks for 200 and `data.val` for 100 of 300 records"),
    ],
)
def test_too_few_groups_or_records_are_a_sentence(
    sizes: dict[str, int], val: float, test: float, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        split(sizes, val=val, test=test, seed=0)
