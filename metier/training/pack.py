"""Records of uneven length -> rows without padding, in a fixed budget of tokens.

Records lie end to end in one row; position_ids restart at 0 with each, and from that the model's own
mask code keeps attention inside a record (in every architecture that transformers has, sliding windows
included). Packing changes which records share a pass, never what a record computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from metier.model.chat import IGNORE_INDEX, Rendered


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One pass: input_ids, position_ids [1, T] int64; the N positions that carry loss and their targets [N] int64.

    `lengths` are the records' tokens, in their order in the row. loss_weights [N] fp32 is how much each loss counts;
    None where all count the same. row_keys [T] int32, if any, decide dropout's masks.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    loss_positions: torch.Tensor
    loss_targets: torch.Tensor
    lengths: tuple[int, ...]
    loss_weights: torch.Tensor | None = None
    row_keys: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_loss_tokens(self) -> int:
        return self.loss_targets.shape[0]

    @property
    def loss_weight(self) -> float:
        """The sum of `loss_weights`."""
        return self.num_loss_tokens if self.loss_weights is None else float(self.loss_weights.double().sum())

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.loss_positions.to(device, non_blocking=True),
            self.loss_targets.to(device, non_blocking=True),
            self.lengths,
            None if self.loss_weights is None else self.loss_weights.to(device, non_blocking=True),
            None if self.row_keys is None else self.row_keys.to(device, non_blocking=True),
        )


def pack(lengths: Sequence[int], max_tokens: int, max_records: int) -> list[list[int]]:
    """First-fit decreasing: indices into `lengths`, row by row; a record longer than the budget has a row alone.

    Deterministic: ties keep the records' order.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, left in enumerate(room):
            if lengths[index] <= left and len(rows[row]) < max_records:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(max_tokens - lengths[index])
    return rows


def collate(records: Sequence[Rendered], keys: Sequence[int] | None = None) -> PackedBatch:
    """Lays records end to end. The target of a position is the next token's label, within its record alone.

    `keys`, one a record, become its tokens' row_keys.
    """
    lengths = torch.tensor([record.num_tokens for record in records])
    ends = lengths.cumsum(0)
    input_ids = torch.tensor([token for record in records for token in record.input_ids])
    labels = torch.tensor([label for record in records for label in record.labels])
    targets = labels.roll(-1)
    targets[ends - 1] = IGNORE_INDEX
    positions = (targets != IGNORE_INDEX).nonzero()[:, 0]
    weights = None
    if any(record.weight != 1 for record in records):
        each = torch.tensor([record.weight for record in records], dtype=torch.float32)
        weights = each.repeat_interleave(lengths)[positions]
    places = torch.arange(len(input_ids)) - (ends - lengths).repeat_interleave(lengths)
    row_keys = None
    if keys is not None:  # any keys: one a token, from its record's and its place in the record
        row_keys = (places * 0x9E3779B1 + torch.tensor(keys).repeat_interleave(lengths)) & 0xFFFFFFFF
        row_keys = (row_keys - (1 << 31)).to(torch.int32)
    return PackedBatch(
        input_ids[None], places[None], positions, targets[positions], tuple(lengths.tolist()), weights, row_keys
    )


def pack_batches(
    records: Sequence[Rendered], max_tokens: int, max_records: int, keys: Sequence[int] | None = None
) -> list[PackedBatch]:
    """`pack` and `collate` in one: the passes that these records need. `keys`, one a record, are below 2^31."""
    rows = pack([r.num_tokens for r in records], max_tokens, max_records)
    return [collate([records[i] for i in row], None if keys is None else [keys[i] for i in row]) for row in rows]
