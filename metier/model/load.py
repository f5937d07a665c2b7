"""A base model's folder -> the model, frozen, with its tokenizer. The only importer of transformers.

The checkpoint is the model definition: config, tokenizer and weights are what its files say, weights
come from safetensors alone, and no code from a checkpoint is run. What does not fit is refused before
gigabytes are read.

Limits: quantised checkpoints are refused, but for GGUF files, which become fp32 safetensors once.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import normalizers, pre_tokenizers
from torch import nn

from metier.errors import ModelError, RunError
from metier.kernels.frozen import Storage
from metier.model import weights
from metier.model.embedded import Progress, say
from metier.model.fused import is_fused_architecture
from metier.model.gguf_header import read_header
from metier.model.quantise import check_storage, quantise_linear, quantise_linears, quantise_model
from metier.model.resolve import base_digest, first_line, read_json, resolve_base
from metier.model.rounding import Rounding, rounding_ids
from metier.model.shards import Shards, shards_of, when_whole
from metier.model.template_check import check_template

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# Its type hints are partial: what comes out of it is checked here, not by the type checker.
_hf: Any = transformers


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen base model: in eval mode, no parameter requires a gradient.

    `name` is what was asked for, `path` the folder it came from, `revision` a hub model's commit, and
    `digest` covers every file of the checkpoint.
    """

    # A transformers model; its classes' type hints are partial.
    model: Any
    tokenizer: Any
    path: Path
    name: str
    revision: str | None
    digest: str
    dtype: torch.dtype
    device: torch.device
    storage: Storage = "dense"

    @property
    def precision(self) -> str:
        """How the weights are kept: `fp8`, `nf4`, or the dtype's name."""
        return str(self.dtype).removeprefix("torch.") if self.storage == "dense" else self.storage

    @property
    def config(self) -> Any:
        """The language model's configuration, also where it is a part of a larger one."""
        return self.model.config.get_text_config()


def load_base(
    path_or_name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device,
    storage: Storage = "dense",
    shared: bool = False,
    progress: Progress = say,
) -> Base:
    """Loads a base model and its tokenizer onto `device` in `dtype`, frozen, with SDPA attention.

    With `storage` fp8 or nf4 its linear layers but the head are quantised; `shared`, its decoder layers are divided
    over the processes of the training (`metier.model.shards`), which all call this.

    Raises `ModelError` for a storage that the device cannot work with, for what `resolve_base` refuses, a checkpoint
    that needs code of its own, an architecture that transformers does not have, damaged or missing weights, a missing
    tokenizer, and a vocabulary that is larger than the embeddings.
    """
    check_storage(storage, device)
    name = str(path_or_name)
    path = resolve_base(name, revision, progress=progress)
    with _quiet():
        _check_architecture(path, progress)
        tokenizer = load_tokenizer(path)
        if isinstance(tokenizer.chat_template, str):
            check_template(tokenizer.chat_template)
        model = _load_model(path, tokenizer, dtype, device, storage, progress, shared=shared)
    top = max(tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().num_embeddings
    if top >= rows:
        raise ModelError(
            f"the tokenizer in `{path}` has ids up to {top}, and the model has embeddings for {rows} tokens only",
            hint="tokens were added without resizing the model; use the tokenizer that the weights were saved with",
        )
    if bad := _first_not_finite(model):
        raise ModelError(f"`{bad}` in `{path}` holds numbers that are not finite", hint="fetch the model again")
    model.requires_grad_(False).eval()
    commit = path.name if path.parent.name == "snapshots" else None
    return Base(model, tokenizer, path, name, commit, base_digest(path), dtype, device, storage)


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer, exactly as its tokenizer.json says, when it has one.

    transformers 5 rebuilds the pipelines of some classes instead: `LlamaTokenizer` then splits leading spaces
    otherwise than LLaMA-2's own (15 of llama.cpp's 47 test strings). Raises `ModelError` when there is no
    tokenizer, or it cannot be read.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"`{path}` has weights but no tokenizer (none of {', '.join(TOKENIZER_FILES)})",
            hint="copy the tokenizer's files of the same model into the folder",
        )
    exact = (path / "tokenizer.json").is_file()
    kind = _hf.PreTrainedTokenizerFast if exact else _hf.AutoTokenizer
    try:
        return kind.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    # tokenizers raises a bare Exception for a file that it cannot parse.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in `{path}` cannot be read: {first_line(error)}",
            hint="fetch the model again, or save its tokenizer with a current transformers",
        ) from error


def gguf_tokenizer(gguf: Path) -> Any:
    """The tokenizer of a GGUF file, a vocabulary alone included.

    transformers gives SentencePiece vocabularies (LLaMA-2's) a pre-tokenizer that leaves out the space which
    SentencePiece puts before every text that begins with one; the pipeline of Meta's own tokenizer.json stands
    in for it, and llama.cpp's 47 test strings agree.
    """
    tokenizer = _hf.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    pipeline = tokenizer.backend_tokenizer
    if isinstance(pipeline.pre_tokenizer, pre_tokenizers.Metaspace):
        pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        pipeline.pre_tokenizer = None
    return tokenizer


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a GGUF file into `folder`, as fp32 safetensors and tokenizer.json.

    The values are the file's dequantised ones, to the last bit. Raises `ModelError` for a file that
    cannot be read or an architecture that transformers does not convert, and `RunError` for a full disk.
    """
    header = read_header(gguf)
    # transformers leaves the size of Qwen3's heads at 128 whatever the file says.
    head_size = header.fields.get(f"{header.architecture}.attention.key_length")
    sizes = {"head_dim": head_size} if header.architecture == "qwen3" and head_size else {}
    # The converter's bar asks nobody: it writes to standard error whatever the settings say.
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = gguf_tokenizer(gguf)
            loaded = _hf.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **sizes
            )
        # The gguf reader fails on a damaged file with whatever its bytes lead to.
        except Exception as error:
            raise ModelError(
                f"the GGUF file `{gguf}` cannot be converted: {first_line(error)}",
                hint="name a folder of safetensors or a hub id instead",
            ) from error
        # What comes from GGUF keeps a quantizer that refuses to be saved, though its weights are plain fp32.
        save_weights(loaded, loaded.state_dict(), folder)
        _without_invented(tokenizer, loaded.get_input_embeddings().num_embeddings).save_pretrained(folder)


def _without_invented(tokenizer: Any, rows: int) -> Any:
    """transformers adds `<|endoftext|>` to a GGUF's vocabulary without it (LLaMA 3's), beyond the embeddings."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in pipeline["added_tokens"] if token["id"] < rows]
    if len(kept) == len(pipeline["added_tokens"]):
        return tokenizer
    backend = tokenizers.Tokenizer.from_str(json.dumps(pipeline | {"added_tokens": kept}))
    return _hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=tokenizer.chat_template, **tokenizer.special_tokens_map
    )


def save_weights(model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes a checkpoint of `model`'s class and config with the weights `state`, in shards of at most 5 GB.

    The embeddings are tied as config says, unless `state` has an output head of its own. Raises `RunError` for
    a full disk.
    """
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(settings))
    plain.load_state_dict(state, assign=True, strict=False)
    plain.tie_weights()
    if missing := [name for name, tensor in plain.state_dict().items() if tensor.is_meta]:
        raise ModelError(f"no weight was given for `{missing[0]}`")
    plain.generation_config = model.generation_config
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            plain.save_pretrained(folder, max_shard_size="5GB")
        except SafetensorError as error:
            raise RunError(f"the weights could not be written to `{folder}`: {first_line(error)}") from error


def others_tokenizer(path: Path) -> Any:
    """The tokenizer that other programs get from a folder: transformers' own choice of class. Raises `ModelError`."""
    try:
        return _hf.AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as in `load_tokenizer`
        raise ModelError(f"the tokenizer in `{path}` cannot be read: {first_line(error)}") from error


def _check_architecture(path: Path, progress: Progress) -> None:
    """Refuses what transformers would load wrongly, only with code from the checkpoint, or not at all."""
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind not in _hf.CONFIG_MAPPING:
        if "auto_map" in config:
            raise ModelError(
                f"`{path}` needs Python code from the checkpoint (`auto_map` in config.json), and metier runs none",
                hint="name a model of an architecture that transformers ships, e.g. a LLaMA, Mistral or Qwen model",
            )
        raise ModelError(
            f"`{path}` is of the architecture `{kind}`, which transformers {transformers.__version__} does not have",
            hint="check `model_type` in config.json; a newer transformers may have it",
        )
    if "auto_map" in config:
        progress(f"the checkpoint brings code of its own for `{kind}`; it is not run, transformers' own class is used")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise ModelError(
            f"`{path}` is quantised (`{method}`), and metier takes full-precision safetensors",
            hint="name the original model",
        )
    classes = _hf.MODEL_FOR_CAUSAL_LM_MAPPING.get(_hf.CONFIG_MAPPING[kind], ())
    known = [c.__name__ for c in (classes if isinstance(classes, tuple) else (classes,))]
    stated = config.get("architectures") or known
    if not {n.lower() for n in known} & {n.lower() for n in stated}:
        raise ModelError(
            f"`{path}` is a {', '.join(stated)}, not a model that writes text from left to right",
            hint=f"name a causal language model{f' ({known[0]})' if known else ''}",
        )


def read_config(name: str, revision: str | None = None, shape: dict[str, Any] | None = None) -> Any:
    """The transformers configuration of a base model that may have no weights here: folder, GGUF file, alias or hub id.

    `shape` replaces entries of it; with a `model_type` it stands alone, on that architecture's defaults. Raises
    `ModelError` for what is no model, and for an architecture that transformers does not have.
    """
    shape, path = dict(shape or {}), Path(name).expanduser()
    try:
        with _quiet():
            if kind := shape.pop("model_type", None):
                return _hf.CONFIG_MAPPING[kind](**shape)
            if path.is_file():
                config = _hf.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            elif (path / "config.json").is_file() or ("/" in name and not path.exists() and name[0] not in "./~"):
                config = _hf.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
            else:
                config = _hf.AutoConfig.from_pretrained(resolve_base(name, revision), local_files_only=True)
            config.get_text_config().update(shape)
    # A damaged GGUF file or config.json raises whatever its bytes lead to.
    except (KeyError, ValueError, TypeError, OSError, RuntimeError, ImportError, AttributeError) as error:
        raise ModelError(
            f"`{kind or name}` has no configuration that transformers {transformers.__version__} reads: "
            f"{first_line(error)}",
            hint="name a folder with config.json, a GGUF file, or a shape: `--shape model_type=llama,hidden_size=4096`",
        ) from error
    return config


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model that `config` (a transformers configuration) describes, with no memory for its weights.

    Parameters are on the meta device; buffers, which checkpoints do not hold (rotary frequencies), are real.
    """
    # Types of accelerate are partial.
    init_empty_weights: Any = accelerate.init_empty_weights
    with _quiet(), init_empty_weights(include_buffers=False):
        model = _hf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    return model


def _first_not_finite(model: Any) -> str | None:
    """The name of a parameter with NaN or inf in it; of shared layers one after the other is looked at."""
    shards = shards_of(model)
    layers = enumerate(shards.layers if shards else ())
    owners = {id(parameter): number for number, layer in layers for parameter in layer.parameters()}
    with shards.one_pass(backward=False) if shards else contextlib.nullcontext():
        for name, weight in model.named_parameters():
            if shards and id(weight) in owners:
                shards.need(owners[id(weight)])
            if not bool(torch.isfinite(weight).all()):
                return str(name)
    return None


def _load_model(
    path: Path, tokenizer: Any, dtype: torch.dtype, device: torch.device, storage: Storage, progress: Progress, *,
    shared: bool,
) -> Any:  # fmt: skip
    try:
        model, unexpected, missing = _load_weights(path, tokenizer, dtype, device, storage, shared=shared)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"`{path}` does not fit into the memory of {torch.cuda.get_device_name(device)}",
            hint="free the GPU (see `nvidia-smi`), or take a smaller base",
        ) from error
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError, OSError, SafetensorError) as error:
        raise ModelError(
            f"`{path}` cannot be loaded by transformers {transformers.__version__}: {first_line(error)}"
        ) from error
    if missing:
        raise ModelError(
            f"{len(missing)} of the model's weights are not in `{path}` or of another shape, {missing[0]} first",
            hint="config.json and the safetensors are of different models, or a file is missing",
        )
    if unexpected:
        progress(
            f"{len(unexpected)} tensors of the checkpoint have no place in {type(model).__name__} and are not used"
        )
    return model


def _load_weights(
    path: Path, tokenizer: Any, dtype: torch.dtype, device: torch.device, storage: Storage, *, shared: bool
) -> tuple[Any, list[str], list[str]]:
    """The model, the names in the checkpoint that it has no use for, and those that it misses.

    Each linear layer but the head is quantised as soon as it, or for NF4 its decoder layer, is on the device: the model
    never exists in full.
    """
    config = _hf.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    model, names = empty_model(config, dtype), weights.shard_names(path)
    if weights.can_fill(model, names, weights.shapes_of(names)):
        head = model.get_output_embeddings()

        def quantised(name: str, linear: nn.Linear) -> nn.Module | None:
            return None if linear is head else quantise_linear(linear, storage)

        replace, hears = None if storage == "dense" else quantised, []
        if storage == "nf4" and is_fused_architecture(model.config.get_text_config()):
            replace = None
            ids = rounding_ids(tokenizer, model.get_input_embeddings().num_embeddings)
            hears.append(when_whole(model, Rounding(model, ids).take))
        if shared:
            hears.append(when_whole(model, Shards(model).take))
        unused = weights.fill(model, names, dtype=dtype, device=device, replace=replace, placed=hears)
        if (path / "generation_config.json").is_file():
            model.generation_config = _hf.GenerationConfig.from_pretrained(path)
        return model, unused, []
    # Old spellings of names, fused weights, parts that stay in fp32: transformers knows them all.
    model, report = _hf.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map={"": "cpu" if shared else device}, attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    if shared:  # from the host's memory, layer by layer
        shards = Shards(model)
        for number, layer in enumerate(shards.layers):
            quantise_linears(layer.to(device), storage)
            shards.take(number)
        model.to(device)
    quantise_model(model, storage)
    missing = sorted(report["missing_keys"]) or sorted(str(key[0]) for key in report["mismatched_keys"])
    return model, sorted(report["unexpected_keys"]), missing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars, logs and warnings off the screen, and leaves its settings as they were."""
    verbosity, had_bars = _hf.utils.logging.get_verbosity(), _hf.utils.logging.is_progress_bar_enabled()
    _hf.utils.logging.set_verbosity_error()
    _hf.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _hf.utils.logging.set_verbosity(verbosity)
        if had_bars:
            _hf.utils.logging.enable_progress_bar()
