"""The files of a bundle beside its weights: the model card with the parity table, and what each engine is started with.

Every engine gets one file below serve/, with the least version and the settings without which its 2025-2026 security
holes or its silent defaults (rank cap, chat template) bite. Servers listen on loopback and want a key.

Limits: the files are made and parsed here; the engines themselves are not run by metier.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metier import artifacts
from metier.errors import RunError
from metier.model.resolve import HUB_ID
from metier.model.specialist import Specialist
from metier.serving.ollama import ollama_template
from metier.serving.targets import FLOORS, NEEDS, Plan, Source, vllm_rank, why_not

SMOKE = Path(__file__).with_name("smoke.py.txt")


@dataclass(frozen=True, slots=True)
class Served:
    """What the files name: the adapter, its base (with `revision` when it is a hub model) and the GGUF file."""

    name: str
    base: str
    revision: str | None
    rank: int
    final: Path
    gguf: str | None
    template: str | None
    stops: list[str]

    @property
    def is_hub(self) -> bool:
        return HUB_ID.fullmatch(self.base) is not None and not Path(self.base).exists()

    @property
    def kubernetes_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:50] or "adapter"


def write_bundle(work: Path, plan: Plan, *, reference: Specialist, source: Source, parity: dict[str, Any]) -> None:
    """Writes MODEL_CARD.md, smoke.py and serve/ into `work`; `plan` holds the forms that passed."""
    facts, served = _facts(plan, reference, source), plan.served
    kinds = {form.kind for form in plan.forms}
    left_out = {name: why_not(name, source.entries, source.config) for name in NEEDS if name not in served}
    failed = [name for name in served if NEEDS[name] not in kinds]
    left_out |= {name: f"its form ({NEEDS[name]}) failed the parity gate" for name in failed}
    if "ollama" in served and facts.template is None:
        left_out["ollama"] = "the chat template cannot be written in Ollama's language"
    folder = work / "serve"
    folder.mkdir(exist_ok=True)
    for name in served:
        if name not in left_out:
            file, write = FILES[name]
            artifacts.write_atomic(folder / file, write(facts).encode())
            if file.endswith(".sh"):
                (folder / file).chmod(0o755)
    if "vllm" in served and "vllm" not in left_out:
        artifacts.write_atomic(folder / "proxy.conf", _proxy(facts).encode())
    artifacts.write_atomic(folder / "README.md", _readme(served, left_out).encode())
    artifacts.write_atomic(work / "smoke.py", SMOKE.read_bytes())
    card = (source.run / "MODEL_CARD.md").read_text(encoding="utf-8")
    artifacts.write_atomic(work / "MODEL_CARD.md", f"{card.rstrip()}\n\n{parity_table(parity)}".encode())


def require_card(run: Path) -> None:
    """Raises `RunError` when the run was not evaluated: a bundle without its verdict is not made."""
    if not (run / "MODEL_CARD.md").is_file():
        raise RunError(f"`{run}` has no MODEL_CARD.md, and a bundle carries one", hint="run `metier evaluate` first")


def parity_table(parity: dict[str, Any]) -> str:
    """The forms and how they passed, as Markdown in both languages."""
    lines = [
        "## Export parity · 导出一致性",
        "",
        "Each form was read back and compared with the adapter as measured, on held-out records. · "
        "每种形式都重新读入，并在留出记录上与评测时的适配器逐词元比较。",
        "",
        "| form · 形式 | error, share of the adapter's effect · 误差占适配器作用之比 | gain kept · 保留的增益 | "
        "top-1 agreement · 首选一致率 | passed · 通过 |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, entry in parity["forms"].items():
        values = [_percent(entry[key]) for key in ("kl_ratio", "gain_kept", "top1_agreement")]
        lines.append(f"| {name} | {' | '.join(values)} | {'yes · 是' if entry['passed'] else 'no · 否'} |")
    return "\n".join(lines) + "\n"


def _facts(plan: Plan, reference: Specialist, source: Source) -> Served:
    gguf = next((form.path for form in plan.forms if form.kind == "gguf"), None)
    stops = [reference.base.tokenizer.convert_ids_to_tokens(i) for i in sorted(reference.renderer.stop_token_ids)]
    base = reference.base
    return Served(
        source.run.resolve().name, base.name if base.revision else str(source.entries["base_model_name_or_path"]),
        base.revision, int(source.entries["r"]), plan.final.resolve(), gguf, ollama_template(reference.renderer), stops,
    )  # fmt: skip


def _vllm(facts: Served) -> str:
    module = json.dumps({"name": facts.name, "path": "adapter", "base_model_name": facts.base}, ensure_ascii=False)
    revision = f" --revision {shlex.quote(facts.revision)}" if facts.revision else ""
    return textwrap.dedent(f"""\
        #!/bin/sh
        # {FLOORS["vllm"]}: earlier ones have open holes in request-supplied templates and in their loaders.
        # --chat-template pins the template that was trained with. Runtime loading of adapters stays off. vLLM's key
        # covers /v1 only: put proxy.conf in front of it before anyone else can reach it.
        set -eu
        cd "$(dirname "$0")/.."
        : "${{VLLM_API_KEY:?set VLLM_API_KEY to a secret}}"
        BASE=${{BASE:-{shlex.quote(facts.base)}}}
        unset VLLM_ALLOW_RUNTIME_LORA_UPDATING
        exec vllm serve "$BASE"{revision} \\
          --enable-lora --max-loras 1 --max-lora-rank {vllm_rank(facts.rank)} \\
          --lora-modules {shlex.quote(module)} \\
          --chat-template adapter/chat_template.jinja \\
          --host 127.0.0.1 --port 8000
        """)


def _proxy(facts: Served) -> str:
    return textwrap.dedent("""\
        # nginx in front of vLLM: what is named here is reachable, nothing else. Add TLS for other machines.
        server {
          listen 127.0.0.1:8080;
          client_max_body_size 1m;
          proxy_read_timeout 300s;
          location = /v1/models { proxy_pass http://127.0.0.1:8000; }
          location = /v1/chat/completions { proxy_pass http://127.0.0.1:8000; proxy_buffering off; }
          location = /v1/completions { proxy_pass http://127.0.0.1:8000; proxy_buffering off; }
          location / { return 404; }
        }
        """)


def _ray(facts: Served) -> str:
    head = (
        f"# {FLOORS['ray']}, RAY_AUTH_MODE=token, on a private network: serve run serve/ray_serve.yaml\n"
        "# The merged weights are served: Ray loads LoRA adapters from object storage only. Change model_source when\n"
        "# the bundle is moved; every node must see it.\n"
    )
    config = {
        "model_loading_config": {"model_id": facts.name, "model_source": str(facts.final / "merged")},
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
    }
    app = {
        "name": facts.kubernetes_name, "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }  # fmt: skip
    return head + yaml.safe_dump({"applications": [app]}, sort_keys=False, allow_unicode=True)


def _kserve(facts: Served) -> str:
    head = (
        f"# {FLOORS['kserve']}. Copy adapter/ to the claim `metier-models`, {facts.kubernetes_name}/adapter"
        f"{'' if facts.is_hub else ', and the base under base/'}.\n"
        "# maxRank is written because the controller passes no rank by itself, and vLLM then stops at 16.\n"
    )
    uri = f"hf://{facts.base}" if facts.is_hub else "pvc://metier-models/base"
    adapter = {"name": facts.name, "uri": f"pvc://metier-models/{facts.kubernetes_name}/adapter"}
    model = {
        "uri": uri, "name": facts.base if facts.is_hub else "base",
        "lora": {"maxRank": vllm_rank(facts.rank), "adapters": [adapter]},
    }  # fmt: skip
    service = {
        "apiVersion": "serving.kserve.io/v1alpha1", "kind": "LLMInferenceService",
        "metadata": {"name": facts.kubernetes_name}, "spec": {"model": model, "replicas": 1},
    }  # fmt: skip
    return head + yaml.safe_dump(service, sort_keys=False, allow_unicode=True)


def _llama_cpp(facts: Served) -> str:
    return textwrap.dedent(f"""\
        #!/bin/sh
        # {FLOORS["llama.cpp"]}. The chat template is in the file. Or the adapter on a base in GGUF:
        #   llama-server --model base.gguf --lora gguf/adapter.gguf --jinja
        set -eu
        cd "$(dirname "$0")/.."
        : "${{LLAMA_API_KEY:?set LLAMA_API_KEY to a secret}}"
        export LLAMA_API_KEY
        exec llama-server --model {facts.gguf} --alias {shlex.quote(facts.name)} --jinja --host 127.0.0.1 --port 8000
        """)


def _ollama(facts: Served) -> str:
    stops = "".join(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n" for stop in facts.stops)
    return (
        f"# {FLOORS['ollama']}: ollama create {facts.kubernetes_name} -f serve/Modelfile\n"
        f'FROM ../{facts.gguf}\nTEMPLATE """{facts.template}"""\n{stops}PARAMETER temperature 0\n'
    )


def _mlx(facts: Served) -> str:
    return textwrap.dedent(f"""\
        #!/bin/sh
        # {FLOORS["mlx"]}, for Apple silicon and for one person: its server says itself that it is not for
        # production. Serves the merged weights; `mlx_lm.convert -q` would quantise them past what was checked.
        set -eu
        cd "$(dirname "$0")/.."
        exec mlx_lm.server --model merged --host 127.0.0.1 --port 8000
        """)


FILES: dict[str, tuple[str, Callable[[Served], str]]] = {
    "vllm": ("vllm.sh", _vllm), "ray": ("ray_serve.yaml", _ray), "kserve": ("kserve.yaml", _kserve),
    "llama.cpp": ("llama-server.sh", _llama_cpp), "ollama": ("Modelfile", _ollama), "mlx": ("mlx.sh", _mlx),
}  # fmt: skip


def _readme(served: list[str], left_out: dict[str, str | None]) -> str:
    lines = [
        "# How to serve this bundle · 如何部署",
        "",
        "First `python smoke.py`: it compares every file with the manifest. · 先运行 `python smoke.py` 校验全部文件。",
        "The files below were made and parsed here, not run. · 下列文件在导出时只生成并解析，未曾运行。",
        "",
        "| engine · 引擎 | file · 文件 | needs · 要求 |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {n} | serve/{FILES[n][0]} | {FLOORS[n]} |" for n in served if n not in left_out]
    lines += [f"| {name} | not made · 未生成 | {reason} |" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"
