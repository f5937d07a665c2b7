"""Tries to make records in one row see each other, or to lose or train the wrong token when packing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from metier.model.chat import IGNORE_INDEX, Rendered
from metier.training.pack import collate, pack, pack_batches
from metier.training.step import loss_sum
from tests.model.tiny import KINDS, Kind, tiny_config, tiny_model, tiny_tokenizer


def random_records(count: int, vocab: int, seed: int = 0) -> list[Rendered]:
    draw = random.Random(seed)
    records = []
    for _ in range(count):
        ids = [draw.randrange(vocab) for _ in range(draw.randrange(2, 30))]
        first = draw.randrange(1, len(ids))
        records.append(Rendered(ids, [IGNORE_INDEX] * first + ids[first:]))
    return records


def assert_packed_equals_unpacked(model: Any, records: list[Rendered]) -> None:
    batch = collate(records)
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        apart = torch.cat([model(input_ids=torch.tensor([r.input_ids])).logits[0] for r in records])
    torch.testing.assert_close(packed, apart, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_equal_unpacked(kind: Kind) -> None:
    model, _ = tiny_model(kind)
    records = random_records(7, model.config.vocab_size)
    assert_packed_equals_unpacked(model, records)


def test_packing_holds_with_a_sliding_window() -> None:
    import transformers

    config = tiny_config("mistral", tiny_tokenizer("llama2"))
    config.sliding_window = 5
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    records = random_records(5, config.vocab_size)
    assert_packed_equals_unpacked(model, records)


def test_changing_one_record_changes_no_other_record_s_logits() -> None:
    model, _ = tiny_model("llama3")
    records = random_records(4, model.config.vocab_size)
    changed = [*records[:1], Rendered([1] * records[1].num_tokens, records[1].labels), *records[2:]]
    lengths = [r.num_tokens for r in records]
    with torch.no_grad():
        rows = []
        for group in (records, changed):
            batch = collate(group)
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
            rows.append(logits.split(lengths))
    assert not torch.allclose(rows[0][1], rows[1][1])
    for other in (0, 2, 3):
        assert torch.equal(rows[0][other], rows[1][other])


def test_the_loss_of_a_row_is_the_sum_of_its_records_losses() -> None:
    model, _ = tiny_model("qwen2")
    records = random_records(6, model.config.vocab_size)
    with torch.no_grad():
        together = float(loss_sum(model, collate(records)))
        apart = 0.0
        for record in records:
            logits = model(input_ids=torch.tensor([record.input_ids])).logits[0, :-1].double()
            apart += float(
                torch.nn.functional.cross_entropy(
                    logits, torch.tensor(record.labels[1:]), reduction="sum", ignore_index=-100
                )
            )
    assert together == pytest.approx(apart, rel=1e-5)


def test_collate_never_trains_across_a_boundary() -> None:
    records = [Rendered([1, 2, 3], [IGNORE_INDEX, 2, 3]), Rendered([4, 5], [IGNORE_INDEX, 5])]
    batch = collate(records)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.loss_positions.tolist() == [0, 1, 3] and batch.loss_targets.tolist() == [2, 3, 5]


@pytest.mark.parametrize("seed", range(20))
def test_pack_places_every_record_once_within_both_limits(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randrange(1, 200) for _ in range(draw.randrange(1, 80))]
    budget, most = draw.randrange(50, 300), draw.randrange(1, 9)
    rows = pack(lengths, budget, most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) <= most
        assert len(row) == 1 or sum(lengths[i] for i in row) <= budget
    assert rows == pack(lengths, budget, most)


def test_first_fit_decreasing_wastes_little() -> None:
    draw = random.Random(0)
    lengths = [min(512, int(draw.lognormvariate(5, 0.6))) for _ in range(2000)]
    rows = pack(lengths, 1024, 999)
    assert sum(lengths) / (len(rows) * 1024) > 0.97


def test_pack_batches_keeps_every_loss_token() -> None:
    records = random_records(40, 300)
    batches = pack_batches(records, 100, 16)
    assert sum(b.num_loss_tokens for b in batches) == sum(r.num_loss_tokens for r in records)
    assert sum(b.num_tokens for b in batches) == sum(r.num_tokens for r in records)
