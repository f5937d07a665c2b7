"""The recipe's `adapter` and `train`: what is trained, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from metier.recipe.section import Count, Section


class AdapterConfig(Section):
    """W' = W + (alpha / rank) B A, with W frozen (Hu et al., 2021, arXiv 2106.09685)."""

    rank: int = Field(default=16, ge=1, le=4096, description="Columns of B and rows of A.")
    alpha: float = Field(default=32, gt=0, description="The update is scaled by alpha / rank.")
    target_modules: str | list[str] = Field(
        default="all-linear",
        min_length=1,
        description="`all-linear` (every linear layer but the output head), or names such as [q_proj, v_proj].",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, in training only.")
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Which of the model's own bias terms are trained as well."
    )
    use_rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023, arXiv 2312.03732)."
    )


class TrainConfig(Section):
    """How the adapter is trained: one step updates it once, from micro_batch_size x grad_accum_steps records."""

    epochs: float = Field(default=3, gt=0, description="Passes over the training records.")
    max_steps: Count | None = Field(
        default=None, description="Stop the schedule at this many steps, if epochs are more."
    )
    micro_batch_size: Count = Field(
        default=16, description="Records in one forward and backward pass, packed without padding."
    )
    grad_accum_steps: Count = Field(default=1, description="Micro-batches in one step.")
    micro_batch_tokens: Count | Literal["auto"] = Field(
        default="auto",
        description="Tokens in one pass at most; a larger micro-batch is split, with the same result. "
        "`auto`: as many as fit, fastest first (`metier plan` shows the choice).",
    )
    recompute: Literal["auto", "none", "mlp", "full"] = Field(
        default="auto",
        description="`full`: backward computes each layer's activations again instead of keeping them: far less "
        "memory, a third more time, the same result; `mlp`: a part of them, for half the memory. `auto`: only where "
        "the job does not fit without.",
    )
    max_seq_len: int = Field(default=2048, ge=8, description="Tokens in one record at most.")
    over_length: Literal["reject", "cut_prompt"] = Field(
        default="reject",
        description="A longer record is left out and counted, or its prompt is cut at the end and counted; "
        "an answer is never cut.",
    )
    train_on: Literal["last_assistant", "all_assistant", "all_tokens"] = Field(
        default="last_assistant",
        description="Which tokens carry the loss; an answer's end-of-turn token belongs to it.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="The peak. `auto`: 5e-4 x (2000 / hidden size) ^ 0.781, i.e. 2.9e-4 for a 7B model."
    )
    min_learning_rate: float = Field(default=0.0, ge=0, description="eta_min, where the cosine ends.")
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps in which the rate rises linearly."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay, on the adapter.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="The gradient is scaled down to this norm.")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8", "nf4"] = Field(
        default="auto",
        description="Of the frozen base and of the arithmetic; the adapter itself is fp32. `auto`: bf16 where the "
        "device has units for it, else fp16 on a GPU and fp32 on a CPU. `fp8` (compute capability 8.9 or newer) is the "
        "fastest, with the base in half the memory; `nf4` keeps the base in a quarter (4 bits a weight).",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto`: a GPU if there is one.")
    log_every: Count = Field(default=10, description="Steps between two lines of metrics.jsonl.")
    eval_every: Count | None = Field(
        default=None, description="Steps between two validations; default: ten times a run. The best adapter is kept."
    )
    save_every: Count = Field(default=100, description="Steps between two checkpoints; the last two are kept.")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="Send the metrics there too. Nothing is sent anywhere by default."
    )
