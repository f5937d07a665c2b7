"""`metier serve`'s engine and HTTP layer on one GPU under 64 clients, beside transformers' own sequential `generate`.

    python benchmarks/bench_serving_gpu.py --out benchmarks/results/serving_h100_202611.md

LLaMA-2-7B's shape with random weights in bf16, a small byte-level tokenizer, two random adapters (rank 16, all linear
layers): nothing is fetched. Clients stream over HTTP from a process of their own. `--tiny` rehearses it on a CPU.
Random weights seldom say the stop token, so answers have their full length, and near ties make greedy answers differ
where a sum is added in another order: how many do is told.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
WORDS = ["river", "invoice", "fever", "teacher", "ledger", "clinic", "pupil", "budget", "harbour", "lesson", "asthma"]


def make_jobs(number: int, models: list[str], max_tokens: int) -> list[dict[str, Any]]:
    """Questions of about 150 tokens of the small vocabulary, over the models in turn."""
    jobs = []
    for i in range(number):
        words = " ".join(WORDS[(i * 7 + k * 5) % len(WORDS)] for k in range(20 + i % 9))
        message = {"role": "user", "content": f"{i}: {words}"}
        body = {"model": models[i % len(models)], "messages": [message], "max_tokens": max_tokens, "stream": True}
        jobs.append({**body, "stream_options": {"include_usage": True}})
    return jobs


def stream(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """One streamed answer: seconds to its first chunk with text and in all, tokens, text, whether it ended."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    found: dict[str, Any] = {"text": "", "first": None, "tokens": 0, "ok": False}
    for line in connection.getresponse():
        if line.strip() == b"data: [DONE]":
            found["ok"] = found["tokens"] > 0
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            found["tokens"] = (event.get("usage") or {}).get("completion_tokens", found["tokens"])
            for choice in event.get("choices", []):
                if text := choice["delta"].get("content"):
                    found["first"] = found["first"] or time.monotonic() - begun
                    found["text"] += text
    found["seconds"] = time.monotonic() - begun
    connection.close()
    return found


def client(port: int, clients: int, jobs: list[dict[str, Any]]) -> None:
    """The clients' process: all answers and the time for all of them, as JSON on standard output."""
    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda body: stream(port, body), jobs))
    print(json.dumps({"seconds": time.monotonic() - begun, "found": found}))


def load_clients(port: int, clients: int, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--client", str(port), "--clients", str(clients)]
    output = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def make_base(folder: Path, *, is_tiny: bool) -> Any:
    """A `Base` with random weights on the GPU; its folder holds tokenizer and settings alone."""
    import torch
    import transformers

    from metier.model.load import Base
    from tests.model.tiny import tiny_config, tiny_tokenizer

    tokenizer = tiny_tokenizer("llama2")
    # Every id that the model may choose has a text, as in a real vocabulary.
    tokenizer.add_tokens([f" ~{i}" for i in range(32_000 - len(tokenizer))])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = tiny_config("llama2", tokenizer) if is_tiny else transformers.LlamaConfig(**ids)
    device, dtype = (torch.device("cpu"), torch.float32) if is_tiny else (torch.device("cuda"), torch.bfloat16)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    return Base(model, tokenizer, folder, "llama2-7b-shape", None, "random", dtype, device)


def save_adapter_of(base: Any, folder: Path, seed: int) -> Path:
    """A random rank-16 adapter on all linear layers; the model is as before afterwards."""
    import torch

    from metier.model.lora import attach, save_adapter
    from metier.recipe import AdapterConfig

    adapter = attach(base.model, AdapterConfig(rank=16, alpha=32), seed=seed)
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.lora_b, std=0.01)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder, adapter, adapter.tensors(), base=str(base.path), revision=None)
    for where, layer in adapter.layers.items():
        parent, _, child = where.rpartition(".")
        setattr(base.model.get_submodule(parent), child, layer.base)
    return folder


def sequential(base: Any, renderer: Any, jobs: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """Tokens a second of plain `generate`, one request after another, and the answers."""
    from metier.model.generate import SamplingParams, generate_ids

    def answer(body: dict[str, Any]) -> list[int]:
        params = SamplingParams(body["max_tokens"])
        ids = [renderer.prompt(body["messages"])]
        stop = renderer.stop_token_ids
        [(_, new)] = generate_ids(base, ids, params, stop_token_ids=stop, batch_size=1)
        return new

    answer({**jobs[0], "max_tokens": 8})
    begun = time.monotonic()
    answers = [answer(body) for body in jobs]
    rate = sum(map(len, answers)) / (time.monotonic() - begun)
    stops = renderer.stop_token_ids
    return rate, [renderer.decode([i for i in ids if i not in stops]) for ids in answers]


def pass_times(bank: Any, rows: int, names: list[str]) -> str:
    """Milliseconds of a decoding pass over `rows` rows of 150 tokens, the adapters in turn: launched and recorded."""
    from metier.model.decode import Decoder
    from metier.model.slots import SlotCache, forward_rows

    cache = SlotCache()
    cache.reserve(rows, 256)
    decoder = Decoder(bank, cache)
    adapters = [None if (name := names[i % len(names)]) == "base" else name for i in range(rows)]
    for first in range(0, rows, 8):
        part = adapters[first : first + 8]
        bank.select(part)
        forward_rows(
            bank, cache, first=first, tokens=[[5] * 150] * len(part), starts=[0] * len(part), keep=[[0]] * len(part)
        )

    def one_pass() -> None:
        decoder.decode([7] * rows, [150] * rows, adapters).argmax(-1).tolist()

    found = []
    for records in (False, decoder.records):
        decoder.records = records
        begun = time.monotonic()
        one_pass()
        first_pass = time.monotonic() - begun
        begun = time.monotonic()
        for _ in range(10):
            one_pass()
        found.append(f"{(time.monotonic() - begun) * 100:.1f} ms (the first {first_pass:.2f} s)")
    how = "recorded" if decoder.records else "not recorded"
    return f"A decoding pass of {rows} rows: launched {found[0]}, {how} {found[1]}."


def bench(args: argparse.Namespace) -> list[str]:
    import torch

    from metier.model.bank import AdapterBank
    from metier.model.chat import Renderer, eos_token_ids
    from metier.model.template import TemplateProcess
    from metier.serving.guard import Guard
    from metier.serving.models import Model, Models
    from metier.serving.server import Server, ServerSettings, prepare_process

    prepare_process()
    ticks = [time.monotonic()]
    base = make_base(args.work / "base", is_tiny=args.tiny)
    templates = TemplateProcess()
    renderer = Renderer(base.tokenizer, eos_token_ids(base.path), render=templates.render)
    names = ["base", "one", "two"]
    folders = {name: save_adapter_of(base, args.work / name, seed) for seed, name in enumerate(names[1:])}
    jobs = make_jobs(args.requests, names, args.max_tokens)
    ticks.append(time.monotonic())
    plain = [job for job in jobs if job["model"] == "base"][: args.timed]
    rate, want = sequential(base, renderer, plain)
    ticks.append(time.monotonic())
    print(f"ready {ticks[1] - ticks[0]:.1f} s, sequential {rate:.1f} tok/s", flush=True)
    bank = AdapterBank(base)
    for name, folder in folders.items():
        bank.add(name, folder)
    passes = [pass_times(bank, rows, names) for rows in (1, args.clients)]
    print("\n".join(passes), flush=True)
    if not args.tiny:
        torch.cuda.empty_cache()
    guard = Guard()
    models = {n: Model(n, None if n == "base" else n, n, None if n == "base" else "base", n, guard) for n in names}
    settings = ServerSettings(port=0, max_batch=args.clients, max_waiting=1024)
    server = Server(Models(bank, renderer, models), settings).start()
    port = int(server.url.rpartition(":")[2])
    load_clients(port, args.clients, make_jobs(args.clients, names, 4))
    rows, texts = [], []
    for clients in (args.clients, 1):
        some = jobs if clients > 1 else jobs[: args.timed]
        before = server.engine.counters.passes, server.engine.counters.seconds
        result = load_clients(port, clients, some)
        rows.append(row_of(clients, result))
        done, busy = server.engine.counters.passes - before[0], server.engine.counters.seconds - before[1]
        passes.append(f"{clients} clients: {done} passes, {busy / done * 1000:.1f} ms each with what chooses tokens.")
        print(rows[-1], flush=True)
        texts += [f["text"] for f in result["found"]]
    got = [text for text, job in zip(texts, jobs, strict=False) if job["model"] == "base"][: len(want)]
    same = sum(a == b for a, b in zip(got, want, strict=True))
    server.stop()
    server.wait()
    templates.close()
    memory = "" if args.tiny else f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory at the most"
    prompt = statistics.mean(len(renderer.prompt(job["messages"])) for job in jobs)
    return [
        "# Serving on one H100: LLaMA-2-7B shape, base and two adapters, 64 clients", "",
        f"`python benchmarks/bench_serving_gpu.py --out FILE`, {where(args)}{memory}.", "",
        f"Random weights in bf16, prompts of {prompt:.0f} tokens in the mean, {args.max_tokens} new tokens each, "
        "greedy, streamed over HTTP by a client process on the same machine.", "",
        "| clients | requests | lost | new tokens a second | first token: median / 95 % / longest | a request |",
        "|---:|---:|---:|---:|---:|---:|", *rows,
        f"| transformers' `generate`, one after another (base) | {len(plain)} | - | {rate:.1f} | - | - |", "",
        f"Greedy answers of the base equal to those of `generate` alone, to the last character: {same} of {len(want)} "
        "(bf16, random weights: near ties).", "", *passes,
    ]  # fmt: skip


def row_of(clients: int, result: dict[str, Any]) -> str:
    found = result["found"]
    firsts = sorted(f["first"] for f in found if f["first"] is not None)
    rate = sum(f["tokens"] for f in found) / result["seconds"]
    lost = sum(not f["ok"] for f in found)
    return (
        f"| {clients} | {len(found)} | {lost} | {rate:,.1f} | {statistics.median(firsts):.3f} s / "
        f"{firsts[int(len(firsts) * 0.95)]:.3f} s / {firsts[-1]:.3f} s | "
        f"{statistics.median(f['seconds'] for f in found):.2f} s |"
    )


def where(args: argparse.Namespace) -> str:
    import torch
    import transformers

    device = "a CPU (rehearsal, tiny model)" if args.tiny else f"one {torch.cuda.get_device_name()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}, {versions}, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--timed", type=int, default=3, help="requests that are timed one after another")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("/tmp/serving-gpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        client(args.client, args.clients, json.load(sys.stdin))
        return
    lines = bench(args)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
