"""Tries to make the GPU's fused path differ from float64, a graph from a plain pass, a record from itself elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metier.kernels import nf4
from metier.kernels.attention import Documents, attend
from metier.kernels.frozen import Fp8Weight, Nf4Weight, Storage, freeze
from metier.kernels.reference import FP8, Rows, quantise_rows
from metier.model import graphs
from metier.model.fused import fuse
from metier.model.lora import Adapter, attach
from metier.model.quantise import FrozenLinear, quantise_model
from metier.recipe import AdapterConfig
from metier.training.pack import pack_batches
from metier.training.step import accumulate, loss_sum
from tests.model.test_lora import randomised
from tests.model.tiny import KINDS, Kind, tiny_model
from tests.training.test_pack import random_records

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def fused_on_gpu(
    kind: Kind, dtype: torch.dtype, storage: Storage = "dense", *, dropout: float = 0.0, **options: Any
) -> tuple[Any, Adapter, Any]:
    model = tiny_model(kind)[0].to(CUDA, dtype)
    quantise_model(model, storage)
    adapter = randomised(attach(model, AdapterConfig(rank=4, alpha=2, dropout=dropout), seed=0))
    fused = fuse(model, adapter, **options)
    assert fused is not None
    return model, adapter, fused


def gradients(model: Any, adapter: Adapter, batches: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    for parameter in adapter.parameters.values():
        parameter.grad = None
    weight = torch.full((), 0.125, device=batches[0].input_ids.device)
    loss = sum(float(accumulate(model, batch, weight)) for batch in batches)
    return loss, {n: p.grad.double().cpu() for n, p in adapter.parameters.items() if p.grad is not None}


def truth(kind: Kind, dropout: float = 0.0) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers in float64 on the CPU."""
    model = tiny_model(kind)[0].double().train()
    adapter = randomised(attach(model, AdapterConfig(rank=4, alpha=2, dropout=dropout), seed=0))
    for layer in adapter.layers.values():
        layer.lora_a.data, layer.lora_b.data = layer.lora_a.data.double(), layer.lora_b.data.double()
    return gradients(model, adapter, batches_for(model))


def batches_for(model: Any, device: torch.device | str = "cpu") -> list[Any]:
    batches = pack_batches(random_records(9, model.config.vocab_size), 200, 99, list(range(9)))
    return [b.to(torch.device(device)) for b in batches]


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    x, y = (torch.cat([d[name].flatten() for name in sorted(b)]) for d in (a, b))
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_on_the_gpu_equals_float64(kind: Kind) -> None:
    want, want_grads = truth(kind)
    model, adapter, fused = fused_on_gpu(kind, torch.float32)
    got, grads = gradients(fused, adapter, batches_for(model, CUDA))
    assert got == pytest.approx(want, rel=1e-4)
    for name, grad in want_grads.items():
        assert (grads[name] - grad).norm() <= 2e-3 * grad.norm(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "storage", "least"),
    [(torch.float32, "dense", 0.9999), (torch.bfloat16, "dense", 0.99), (torch.bfloat16, "fp8", 0.9)],
    ids=str,
)
@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_dropout_is_that_of_the_plain_layers(
    kind: Kind, dtype: torch.dtype, storage: Storage, least: float, recompute: str
) -> None:  # fmt: skip
    want, want_grads = truth(kind, dropout=0.2)
    without, _ = truth(kind)
    model, adapter, fused = fused_on_gpu(kind, dtype, storage, dropout=0.2, recompute=recompute)
    fused.train()
    got, grads = gradients(fused, adapter, batches_for(model, CUDA))
    assert abs(got - want) < 0.2 * abs(without - want) or dtype != torch.float32
    assert grads.keys() == want_grads.keys()
    assert cosine(grads, want_grads) >= least
    if fused.graphs is not None:
        assert fused.graphs.recorded
        again, _ = gradients(fused, adapter, batches_for(model, CUDA))
        assert again == pytest.approx(got, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("storage", "copies", "recompute", "least"),
    [("dense", 2, "none", 0.999), ("dense", 2, "layer", 0.999), ("fp8", 2, "none", 0.98), ("fp8", 1, "mlp", 0.98),
     ("nf4", 2, "none", 0.8), ("nf4", 2, "layer", 0.8)],
)  # fmt: skip
def test_16_bits_fp8_and_nf4_point_where_float64_points(
    kind: Kind, storage: Storage, copies: int, recompute: Any, least: float
) -> None:
    want, want_grads = truth(kind)
    model, adapter, fused = fused_on_gpu(kind, torch.bfloat16, storage, fp8_copies=copies, recompute=recompute)
    got, grads = gradients(fused, adapter, batches_for(model, CUDA))
    assert got == pytest.approx(want, rel=0.02 if storage != "nf4" else 0.15)
    assert cosine(grads, want_grads) >= least


@pytest.mark.parametrize("kind", ["smollm2", "qwen3"])
@pytest.mark.parametrize("storage", ["dense", "fp8"])
def test_a_graph_gives_what_a_plain_pass_gives(kind: Kind, storage: Storage) -> None:
    model, adapter, fused = fused_on_gpu(kind, torch.bfloat16, storage)
    batches = batches_for(model, CUDA) + batches_for(model, CUDA)[:1]
    assert fused.graphs is not None
    for _ in range(2):  # recorded, then replayed
        got, grads = gradients(fused, adapter, batches)
    assert fused.graphs.recorded
    fused.graphs = None
    want, want_grads = gradients(fused, adapter, batches)
    assert got == pytest.approx(want, rel=2e-3)
    assert cosine(grads, want_grads) >= 0.9995
    for name, grad in want_grads.items():
        assert (grads[name] - grad).norm() <= 0.05 * grad.norm(), name


@pytest.mark.parametrize("storage", ["dense", "fp8", "nf4"])
def test_a_record_s_loss_does_not_depend_on_its_neighbours(storage: Storage) -> None:
    model, _, fused = fused_on_gpu("llama3", torch.bfloat16, storage)
    records = random_records(6, model.config.vocab_size)
    with torch.no_grad():
        together = float(loss_sum(fused, pack_batches(records, 10_000, 99)[0].to(CUDA)))
        apart = sum(float(loss_sum(fused, pack_batches([r], 10_000, 99)[0].to(CUDA))) for r in records)
    assert together == pytest.approx(apart, rel=3e-3)


@pytest.mark.parametrize("storage", ["fp8", "nf4"])
def test_the_model_computes_the_same_under_transformers_as_fused(storage: Storage) -> None:
    model, adapter, fused = fused_on_gpu("qwen2", torch.bfloat16, storage)
    batch = batches_for(model, CUDA)[0]
    with torch.no_grad():
        assert float(loss_sum(fused, batch)) == pytest.approx(float(loss_sum(model, batch)), rel=2e-2)
    assert isinstance(adapter.layers["model.layers.0.mlp.up_proj"].base, FrozenLinear)


@pytest.mark.parametrize("storage", ["fp8", "nf4"])
@pytest.mark.parametrize("shape", [(48, 64), (272, 192), (4096, 1024)])
def test_products_with_a_quantised_weight_equal_its_dequantised_form(storage: Storage, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = freeze(torch.randn(shape, device=CUDA, dtype=torch.bfloat16), storage)
    plain = weight.dequantised(torch.float32)
    for cols, product, want in ((shape[1], weight.matmul, plain.T), (shape[0], weight.matmul_t, plain)):
        x = torch.randn(33, cols, device=CUDA)
        if product == weight.matmul_t:
            assert weight.column_scale is not None
            rows = Rows(None, *quantise_rows(x * weight.column_scale))
        else:
            rows = Rows(None, *quantise_rows(x))
        exact = x @ want
        assert (product(rows).float() - exact).norm() <= 0.05 * exact.norm()
    if isinstance(weight, Fp8Weight):
        before = weight.matmul_t(rows)
        weight.keep_transposed()
        assert torch.equal(weight.matmul_t(rows), before)
    if isinstance(weight, Nf4Weight):
        torch.testing.assert_close(
            weight.dequantised(torch.bfloat16), nf4.dequantise_nf4(weight.parts[0], torch.bfloat16), rtol=8e-3, atol=0
        )
        eight = weight._to_fp8(transposed=False)
        assert eight.dtype == FP8
        assert torch.equal(weight._to_fp8(transposed=True).view(torch.uint8).T, eight.view(torch.uint8))


@pytest.mark.parametrize("lengths", [(128, 128, 128), (256,), (100, 3, 57), (1, 1, 1)])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (4, 4, 16)])
def test_attention_on_the_gpu_equals_float64(lengths: tuple[int, ...], heads: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    many, few, size = heads
    parts = [torch.randn(sum(lengths), n, size, device=CUDA, dtype=torch.bfloat16) for n in (many, few, few)]
    grad = torch.randn_like(parts[0])
    results = []
    for is_flash, work in ((True, torch.bfloat16), (False, torch.float64)):
        leaves = [p.detach().to(work, copy=True).requires_grad_() for p in parts]
        out = attend(*leaves, Documents.of(lengths, CUDA, is_flash=is_flash))
        out.backward(grad.to(work))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        # One token attends to itself alone: the gradient of q and k is then zero.
        assert (got.double() - want).norm() <= 1e-2 * want.norm() + 1e-4


def test_a_long_pass_is_recorded_when_it_has_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LONG_WORK", 0.0)
    monkeypatch.setattr(graphs, "MEETINGS", 3)
    model, adapter, fused = fused_on_gpu("smollm2", torch.bfloat16, "fp8")
    batches = batches_for(model, CUDA)[:1]
    assert fused.graphs is not None
    want, want_grads = gradients(fused, adapter, batches)
    for meeting in (2, 3, 4, 5):
        if meeting == 5:
            assert fused.graphs.give_up()
        got, grads = gradients(fused, adapter, batches)
        assert bool(fused.graphs.recorded) == (meeting in (3, 4))
        assert got == pytest.approx(want, rel=2e-3)
        assert cosine(grads, want_grads) >= 0.9995
