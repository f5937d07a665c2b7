"""Tries to make the fused path differ from transformers with plain LoRA layers, in loss or in any gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metier.kernels.frozen import DenseWeight
from metier.kernels.reference import Rows
from metier.model.fused import FusedModel, Recompute, fuse, is_fused_architecture
from metier.model.lora import Adapter, attach, new_adapter
from metier.recipe import AdapterConfig
from metier.training.pack import PackedBatch, pack_batches
from metier.training.step import accumulate, loss_sum
from metier.training.together import side_by_side
from tests.model.test_lora import randomised
from tests.model.tiny import KINDS, Kind, tiny_model
from tests.training.test_pack import random_records


def with_adapter(kind: Kind, dtype: torch.dtype, **settings: Any) -> tuple[Any, Adapter]:
    model = tiny_model(kind)[0].to(dtype)
    adapter = randomised(attach(model, AdapterConfig(**{"rank": 4, "alpha": 8, **settings}), seed=0))
    for layer in adapter.layers.values():
        layer.lora_a.data, layer.lora_b.data = layer.lora_a.data.to(dtype), layer.lora_b.data.to(dtype)
    return model, adapter


def batch_for(model: Any) -> PackedBatch:
    (batch,) = pack_batches(random_records(7, model.config.vocab_size), 10_000, 99)
    return batch


def gradients(model: Any, adapter: Adapter, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for parameter in adapter.parameters.values():
        parameter.grad = None
    loss = loss_sum(model, batch)
    torch.autograd.backward(loss)
    grads = {}
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad.clone()
    return loss.detach(), grads


def fused_of(model: Any, adapter: Adapter, recompute: Recompute = "none") -> FusedModel:
    fused = fuse(model, adapter, recompute=recompute)
    assert fused is not None
    return fused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 1, "alpha": 2, "use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]},
     {"target_modules": ["down_proj"]},
     {"target_modules": ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"]}],
    ids=str,
)  # fmt: skip
def test_loss_and_every_gradient_equal_transformers_in_float64(kind: Kind, settings: dict[str, Any]) -> None:
    model, adapter = with_adapter(kind, torch.float64, **settings)
    batch = batch_for(model)
    want, want_grads = gradients(model, adapter, batch)
    got, got_grads = gradients(fused_of(model, adapter), adapter, batch)
    # transformers rounds norms and the loss to fp32, whatever the model's dtype.
    assert abs(float(got - want)) <= 1e-6 * float(want)
    for name, grad in want_grads.items():
        assert grad.norm() > 0
        assert (got_grads[name] - grad).norm() <= 1e-4 * grad.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_equal_to_rounding(kind: Kind) -> None:
    model, adapter = with_adapter(kind, torch.float32, rank=16)
    batch = batch_for(model)
    want, want_grads = gradients(model, adapter, batch)
    got, got_grads = gradients(fused_of(model, adapter), adapter, batch)
    assert abs(float(got - want)) <= 1e-5 * float(want)
    for name, grad in want_grads.items():
        assert (got_grads[name] - grad).norm() <= 5e-5 * grad.norm(), name


def dropped_gradients(model: Any, adapter: Adapter, seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of a training pass, in which dropout's masks follow from keys."""
    records = random_records(7, (model.model if isinstance(model, FusedModel) else model).config.vocab_size)
    (batch,) = pack_batches(records, 10_000, 99, [seed + number for number in range(len(records))])
    for parameter in adapter.parameters.values():
        parameter.grad = None
    model.train()
    dtype = next(iter(adapter.parameters.values())).dtype
    loss = accumulate(model, batch, torch.ones((), dtype=dtype))
    return float(loss), {name: p.grad.clone() for name, p in adapter.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target_modules", ["all-linear", ["k_proj", "up_proj"]], ids=str)
@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_dropout_masks_and_gradients_equal_the_plain_layers(
    kind: Kind, target_modules: Any, recompute: Recompute
) -> None:  # fmt: skip
    model, adapter = with_adapter(kind, torch.float64, dropout=0.3, target_modules=target_modules)
    want, want_grads = dropped_gradients(model, adapter, 1)
    other, _ = dropped_gradients(model, adapter, 2)
    fused = fused_of(model, adapter, recompute)
    got, got_grads = dropped_gradients(fused, adapter, 1)
    assert got == pytest.approx(want, rel=1e-6)
    assert other != pytest.approx(want, rel=1e-4)
    assert got_grads.keys() == want_grads.keys() == adapter.parameters.keys()
    for name, grad in want_grads.items():
        assert grad.norm() > 0
        assert (got_grads[name] - grad).norm() <= 1e-4 * grad.norm(), name
    fused.eval()
    model.eval()
    (batch,) = pack_batches(random_records(7, model.config.vocab_size), 10_000, 99)
    with torch.no_grad():
        assert float(loss_sum(fused, batch)) == pytest.approx(float(loss_sum(model, batch)), rel=1e-6)


class CountedWeight(DenseWeight):
    """A weight that counts its forward products."""

    __slots__ = ("count",)

    def matmul(self, x: Rows) -> torch.Tensor:
        self.count = getattr(self, "count", 0) + 1
        return super().matmul(x)


def test_a_recomputed_layer_ends_before_its_last_product() -> None:
    model, adapter = with_adapter("llama3", torch.float64)
    fused = fused_of(model, adapter, "layer")
    for layer in fused.layers:
        for site in layer.sites:
            assert isinstance(site.weight, DenseWeight)
            site.weight = CountedWeight(site.weight.weight)
    gradients(fused, adapter, batch_for(model))
    counts = [[site.weight.count for site in layer.sites] for layer in fused.layers]  # type: ignore[union-attr]
    assert counts == [[2, 2, 2, 1]] * len(fused.layers)


@pytest.mark.parametrize("recompute", ["mlp", "layer"])
def test_recomputing_changes_no_bit(recompute: Recompute) -> None:
    model, adapter = with_adapter("qwen3", torch.float32)
    batch = batch_for(model)
    fused = fused_of(model, adapter)
    want, want_grads = gradients(fused, adapter, batch)
    fused.recompute = recompute
    got, got_grads = gradients(fused, adapter, batch)
    assert torch.equal(got, want)
    for name, grad in want_grads.items():
        assert torch.equal(got_grads[name], grad), name


def test_the_model_itself_generates_as_before_it_was_fused() -> None:
    model, adapter = with_adapter("llama3", torch.float32)
    ids = torch.arange(20)[None]
    before = model(input_ids=ids).logits
    with adapter.off():
        alone = model(input_ids=ids).logits
    fused_of(model, adapter)
    assert torch.equal(model(input_ids=ids).logits, before)
    with adapter.off():
        assert torch.equal(model(input_ids=ids).logits, alone)


def test_a_document_is_not_changed_by_its_neighbours() -> None:
    model, adapter = with_adapter("smollm2", torch.float32)
    records = random_records(5, model.config.vocab_size)
    fused = fused_of(model, adapter)
    with torch.no_grad():
        together = float(loss_sum(fused, pack_batches(records, 10_000, 99)[0]))
        apart = sum(float(loss_sum(fused, pack_batches([r], 10_000, 99)[0])) for r in records)
    assert together == pytest.approx(apart, rel=1e-5)


def test_what_the_fused_path_does_not_do_takes_the_other() -> None:
    for settings in ({"bias": "all"}, {"target_modules": ["q_proj", "lm_head"]}):
        model, adapter = with_adapter("qwen2", torch.float32, **settings)
        assert fuse(model, adapter) is None
    config = tiny_model("mistral")[0].config
    assert is_fused_architecture(config)
    config.sliding_window = 16
    assert not is_fused_architecture(config)


TOGETHER: list[dict[str, Any]] = [
    {"rank": 3, "alpha": 6}, {"rank": 5, "use_rslora": True}, {"rank": 2},
]  # fmt: skip
IN_ONE_LAYER = {"rank": 2, "target_modules": ["layers.1.mlp.up_proj"]}
PARTLY = {"rank": 7, "alpha": 1, "target_modules": ["q_proj", "up_proj", "down_proj"]}


def adapters_of(model: Any, settings: list[dict[str, Any]]) -> list[Adapter]:
    found = []
    for number, each in enumerate(settings):
        adapter = randomised(new_adapter(model, AdapterConfig(**each), seed=number))
        for parameter in adapter.parameters.values():
            parameter.data = parameter.data.double() * (1 + number)
        found.append(adapter)
    return found


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "last", [PARTLY, {"rank": 7, "alpha": 1}, {"rank": 2, "target_modules": ["layers.1.mlp.up_proj"]}]
)
def test_several_adapters_get_the_gradients_of_their_own_runs(
    kind: Kind, recompute: Recompute, last: dict[str, Any]
) -> None:
    model = tiny_model(kind)[0].double()
    adapters = adapters_of(model, [*TOGETHER, last])
    company = [
        (number, pack_batches(random_records(3 + number, model.config.vocab_size, seed=number), 10_000, 99)[0])
        for number in (3, 0, 1)  # the third adapter has no rows, and the rows are not in the adapters' order
    ]
    batch, spans, sizes = side_by_side(company)
    fused = fuse(model, *adapters, recompute=recompute)
    assert fused is not None
    fused.clear()
    losses = fused.accumulate_each(batch, torch.ones(batch.num_loss_tokens), spans)
    fused.settle()
    apart = dict(zip([number for number, _ in sizes], losses.split([size for _, size in sizes]), strict=True))
    together = [{name: p.grad for name, p in adapter.parameters.items()} for adapter in adapters]
    assert not any(grad.any() for grad in together[2].values() if grad is not None)
    for number, own in company:
        fused.hold([adapters[number]])
        loss, want = gradients(fused, adapters[number], own)
        assert float(apart[number].sum()) == pytest.approx(float(loss), rel=1e-12)
        for name, grad in want.items():
            got = together[number][name]
            assert got is not None
            assert grad.norm() > 0
            assert (got - grad).norm() <= 1e-11 * grad.norm(), (number, name)


def test_adapters_of_unlike_ranks_take_the_bytes_of_their_own_parameters() -> None:
    model = tiny_model("llama2")[0].bfloat16()
    adapters = [new_adapter(model, AdapterConfig(rank=rank), seed=rank) for rank in (2, 16, 5)]
    num_parameters = sum(adapter.num_parameters for adapter in adapters)
    fused = fuse(model, *adapters)
    assert fused is not None
    sites = [site for layer in fused.layers for site in layer.sites]
    images = [matrix for site in fused.layers[0].sites for matrix in (site.down, site.up) if matrix is not None]
    sums = [total for site in sites for total in site.totals or ()]
    assert sum(image.nbytes for image in images) * len(fused.layers) == 2 * num_parameters
    assert {image.untyped_storage().data_ptr() for image, *_ in fused.images} == {
        images[0].untyped_storage().data_ptr()
    }
    assert images[0].untyped_storage().nbytes() * len(fused.layers) == 2 * num_parameters
    assert sum(total.nbytes for total in sums) == 4 * num_parameters
    batch, spans, _ = side_by_side([(0, pack_batches(random_records(2, model.config.vocab_size), 10_000, 99)[0])])
    fused.clear()
    fused.accumulate_each(batch, torch.ones(batch.num_loss_tokens), spans)
    fused.settle()
    places = {total.untyped_storage().data_ptr() for total in sums}
    for adapter in adapters:  # the gradients are those sums, not copies
        assert all(p.grad is not None and p.grad.untyped_storage().data_ptr() in places
                   for p in adapter.parameters.values())  # fmt: skip
