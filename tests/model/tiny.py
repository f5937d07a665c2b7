"""Tiny models with random weights and a tokenizer trained in code: every architecture and template, no download.

The templates are written from the formats' descriptions: ChatML (OpenAI), [INST] with <<SYS>> (Llama 2)
and the header format (Llama 3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

Kind = Literal["llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm2"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Format = Literal["chatml", "llama2", "llama3"]

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system message stands inside the first [INST]; each exchange begins with BOS and ends with EOS.
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ (system if loop.first else '') + message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('a system message may only stand first') }}{% endif %}{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEMPLATES: dict[Format, str] = {"chatml": CHATML_TEMPLATE, "llama2": LLAMA2_TEMPLATE, "llama3": LLAMA3_TEMPLATE}
SPECIALS: dict[Format, dict[str, str]] = {
    "chatml": {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "llama2": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
}
EXTRA_SPECIALS: dict[Format, list[str]] = {
    "chatml": [], "llama2": [], "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
}  # fmt: skip
SENTENCES = [
    "The patient has a fracture of the left ankle and a history of asthma.",
    "Condition: Acute bronchitis\nICD-10 chapter: Respiratory",
    "I would like to know the interest rate of my savings account, please.",
    "分析股票走势：该公司第三季度营业收入同比增长百分之十二。",
    "经营者应当按照合同的约定向消费者提供商品或者服务。",
]
FORMATS: dict[Kind, Format] = {
    "llama2": "llama2", "llama3": "llama3", "mistral": "llama2",
    "qwen2": "chatml", "qwen3": "chatml", "smollm2": "chatml",
}  # fmt: skip


def tiny_tokenizer(template: Format) -> Any:
    """A byte-level BPE of 384 tokens at most, with the format's special tokens; Llama 2 and 3 add BOS by themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [*SPECIALS[template].values(), *EXTRA_SPECIALS[template]]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if template != "chatml":
        bos = SPECIALS[template]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATES[template], **SPECIALS[template],
        extra_special_tokens=EXTRA_SPECIALS[template],
    )  # fmt: skip


def tiny_config(kind: Kind, tokenizer: Any) -> Any:
    """Hidden size 64, 2 layers, 4 heads; grouped keys and values (2) in all but Llama 2."""
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    llama3_rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    }  # fmt: skip
    if kind == "llama2":
        return transformers.LlamaConfig(**shape | {"num_key_value_heads": 4})
    if kind == "llama3":
        return transformers.LlamaConfig(**shape, rope_parameters=llama3_rope)
    if kind == "mistral":
        return transformers.MistralConfig(**shape, sliding_window=None)
    if kind == "qwen2":
        return transformers.Qwen2Config(**shape)
    if kind == "qwen3":
        return transformers.Qwen3Config(**shape, head_dim=16)
    return transformers.LlamaConfig(**shape | {"tie_word_embeddings": True})


def tiny_model(kind: Kind, seed: int = 0, template: Format | None = None) -> tuple[Any, Any]:
    """A model of `kind` in fp32 on the CPU, in eval mode, and its tokenizer."""
    tokenizer = tiny_tokenizer(template or FORMATS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, tokenizer), dtype=torch.float32)
        # The usual start (0.02) leaves all logits near zero; differences would drown in rounding.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval(), tokenizer


def save_tiny(kind: Kind, folder: Path, seed: int = 0) -> Path:
    """Saves a tiny model of `kind` with its tokenizer and chat template into `folder`, and returns it."""
    model, tokenizer = tiny_model(kind, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
