"""NF4 weights rounded while a model is loaded, so that their errors cancel on what the layers are really given.

In: a model being loaded, its decoder layers in their order. Out: each layer's linear layers as `FrozenLinear`s. A fixed
text (rounding_text.txt: articles of Chinese law, and sentences of metier's own in both languages) and random tokens
run through each layer as soon as its weights are there; their inputs say which errors matter
(`metier.kernels.feedback`). The text is the same for everybody, so a base in NF4 follows from its checkpoint alone.

Limits: architectures of `metier.model.fused`; in others each weight is rounded to the nearest value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from metier.kernels.feedback import GROUP, feedback_factors
from metier.model.quantise import quantise_linear
from metier.model.shards import decoder_layers

TEXT = Path(__file__).with_name("rounding_text.txt")
ROW = 512
RANDOM_ROWS = 4


def rounding_ids(tokenizer: Any, num_tokens: int) -> torch.Tensor:
    """int64 [B, 512], below `num_tokens`: the text, less what fills no row, and rows of random tokens."""
    ids = torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8")).input_ids).clamp(max=num_tokens - 1)
    chance = torch.randint(num_tokens, (RANDOM_ROWS, ROW), generator=torch.Generator().manual_seed(0))
    return torch.cat([ids[: len(ids) // ROW * ROW].view(-1, ROW), chance])


class Rounding:
    """Rounds the decoder layers of `model` to NF4, each when it is whole and in their order."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.layers = list(decoder_layers(model))
        self._hidden: torch.Tensor | None = None

    @torch.no_grad()
    def take(self, number: int) -> None:
        """Rounds a loaded layer."""
        embeddings, layer = self.model.get_input_embeddings(), self.layers[number]
        device = embeddings.weight.device
        if self._hidden is None:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # cuSOLVER's own memory lies beside torch's
            self._hidden = embeddings(self.ids.to(device))
        inputs: dict[nn.Module, torch.Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda module, given: inputs.update({module: given[0]}))
            for module in layer.modules() if type(module) is nn.Linear
        ]  # fmt: skip
        places = torch.arange(ROW, device=device)[None]
        angles = self.model.get_decoder().rotary_emb(self._hidden, places)
        out = layer(self._hidden, attention_mask=None, position_ids=places, position_embeddings=angles)
        self._hidden = out[0] if isinstance(out, tuple) else out
        for hook in hooks:
            hook.remove()
        self._replace(layer, inputs)
        if number == len(self.layers) - 1:
            self._hidden = None

    def _replace(self, layer: nn.Module, inputs: dict[nn.Module, torch.Tensor]) -> None:
        """Linear layers that are given the same rows share their factors."""
        given: torch.Tensor | None = None
        factors: list[torch.Tensor] = []
        for name, module in list(layer.named_modules()):
            if module not in inputs or not isinstance(module, nn.Linear):
                continue
            mine = inputs.pop(module)
            if mine is not given:
                given, factors = mine, []
                # fp16 may overflow, and damaged weights are the caller's to find.
                if mine.shape[-1] % GROUP == 0 and bool(mine.isfinite().all()):
                    factors = feedback_factors(mine.flatten(0, -2))
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, quantise_linear(module, "nf4", factors or None))
