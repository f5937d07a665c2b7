"""Texts -> which are the same as an earlier one, and an order by lot, without holding them: by digests of 16 bytes.

Two of a billion different texts have the same digest with a chance below 1e-20.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]  # [n, 2]


def digest(text: str) -> bytes:
    """16 bytes."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Digests:
    """The digests of texts in the order in which they were added."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, text: str) -> None:
        self._bytes += digest(text)

    def draw(self, text: str) -> None:
        """Adds it as a lot: what is sorted by these is in the order of the texts' SHA-256."""
        self._bytes += hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]

    def keys(self) -> Keys:
        return np.frombuffer(self._bytes, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def in_order(keys: Keys) -> Ints:
    """The positions of the keys in their order, equal ones as they came."""
    return np.lexsort((keys[:, 1], keys[:, 0])).astype(np.int64, copy=False)


def numbered(keys: Keys) -> Ints:
    """[n]: how many smaller keys there are, so that equal keys have the same number, from 0 on without gaps."""
    order = in_order(keys)
    numbers = np.empty(len(keys), dtype=np.int64)
    numbers[order] = np.cumsum(_begins(keys, order)) - 1
    return numbers


def firsts(keys: Keys) -> Ints:
    """[n]: the position of the first key that is the same."""
    order = in_order(keys)
    first = np.empty(len(keys), dtype=np.int64)
    begins = np.flatnonzero(_begins(keys, order))
    first[order] = np.repeat(order[begins], np.diff(np.append(begins, len(keys))))
    return first


def groups_of(keys: Keys) -> list[list[int]]:
    """The positions of keys that are the same, where they are two or more; by the first of them."""
    first = firsts(keys)
    repeated = np.zeros(len(first), dtype=np.bool_)
    repeated[first[first != np.arange(len(first))]] = True
    groups: dict[int, list[int]] = {}
    for position in np.flatnonzero(repeated[first]).tolist():
        groups.setdefault(int(first[position]), []).append(position)
    return list(groups.values())


def _begins(keys: Keys, order: Ints) -> NDArray[np.bool_]:
    """Where, in order, a new key begins."""
    begins = np.ones(len(order), dtype=np.bool_)
    begins[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return begins
