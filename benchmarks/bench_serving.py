"""`metier serve` under conformance, evaluation, load and abuse: one server a part, real weights, results as a page.

    python benchmarks/bench_serving.py runs/one runs/two --requests 500 --abuse 1000 --out serving_cpu_202611.md

In: two runs of one base. Measured: the cases of serving_conformance.py; lm-eval's log-probabilities through the
server against lm-eval's own transformers + PEFT in process; streaming clients on base and both adapters, each
answer against the same request alone through transformers' `generate`; hostile requests; SIGTERM in mid-answer.
Throughput and memory are those of the machine at that moment. `--device cuda --precision bf16` runs it on a GPU,
where equality of answers in bf16 is reported and not asked for.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import polars as pl
import torch

from benchmarks.serving_conformance import Target, requests_of, run_cases
from metier.artifacts import read_manifest
from metier.model.specialist import load

QUESTIONS = [
    "Write three sentences about {}.", "What is {}? Explain it to a child.", "List five facts about {}.",
    "Tell a short story in which {} matters.",
]  # fmt: skip
# Hostile requests before memory is first read.
WARM_UP = 256


class Served:
    """`metier serve` as a process of its own, on a free port."""

    def __init__(self, runs: list[str], args: argparse.Namespace) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, "-c", "from metier.cli import main; main()", "serve", *runs, "--port", str(self.port),
            "--precision", args.precision, "--device", args.device, "--no-guard", "--max-batch", str(args.clients),
        ]  # fmt: skip
        self.log = open(args.work / f"serve-{self.port}.log", "w", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log)
        for _ in range(600):
            time.sleep(0.25)
            if self.process.poll() is not None:
                raise SystemExit(f"metier serve ended at once; see {self.log.name}")
            try:
                if self.call("GET", "/health")[0] == 200:
                    return
            except OSError:
                continue
        self.process.kill()
        raise SystemExit("metier serve did not answer within 150 s")

    def call(self, method: str, path: str, body: Any = None, timeout: float = 300) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} if data is not None else {})
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    @property
    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.log.close()
        return code


def stream(served: Served, job: dict[str, Any]) -> dict[str, Any]:
    """One streamed answer: its text, finish_reason, seconds to the first token and in all, tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=600)
    body = {**job["body"], "stream": True, "stream_options": {"include_usage": True}}
    begun = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    found: dict[str, Any] = {"status": response.status, "text": "", "first": None, "finish": None, "done": False}
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            found["done"] = True
            break
        event = json.loads(line[6:])
        if event.get("usage"):
            found["tokens"] = event["usage"]["completion_tokens"]
        for choice in event.get("choices", []):
            if choice["delta"].get("content"):
                found["first"] = found["first"] or time.monotonic() - begun
                found["text"] += choice["delta"]["content"]
            found["finish"] = choice["finish_reason"] or found["finish"]
    found["seconds"] = time.monotonic() - begun
    connection.close()
    return found


def make_jobs(number: int, models: list[str], terms: list[str], max_tokens: int) -> list[dict[str, Any]]:
    """Requests over the models in turn: records as the adapters know them, and open questions about the same terms."""
    rng = random.Random(0)
    jobs = []
    for i in range(number):
        term = terms[rng.randrange(len(terms))]
        content = term if i % 4 == 3 else QUESTIONS[i % len(QUESTIONS)].format(term.lower())
        body = {"model": models[i % len(models)], "messages": [{"role": "user", "content": content}]}
        jobs.append({"body": {**body, "max_tokens": max_tokens, "temperature": 0}})
    return jobs


def alone(runs: dict[str, str | None], base: str, jobs: list[dict[str, Any]], args: argparse.Namespace) -> float:
    """Puts each job's answer by plain sequential `generate` into it; tokens a second of the first `--timed` of them.

    Answers are kept in the work folder: the long list may be made beforehand, slowly, beside other work.
    """
    file = args.work / f"answers-{args.precision}-{args.max_tokens}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tokens, seconds = 0, 0.0
    for name, run in runs.items():
        specialist = load(run or base, device=args.device, precision=args.precision)
        for number, job in enumerate(jobs):
            messages, key = job["body"]["messages"], f"{name}: {job['body']['messages'][-1]['content']}"
            if job["body"]["model"] == name and (number < args.timed or key not in known):
                begun = time.monotonic()
                [answer] = specialist.complete([messages], max_new_tokens=args.max_tokens)
                if number < args.timed:
                    seconds += time.monotonic() - begun
                    tokens += answer.num_tokens
                known[key] = answer.text
                file.write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
        del specialist
    for job in jobs:
        job["want"] = known[f"{job['body']['model']}: {job['body']['messages'][-1]['content']}"]
    return tokens / seconds if seconds else 0.0


def bench_load(served: Served, jobs: list[dict[str, Any]], clients: int, sequential: float) -> list[str]:
    stream(served, jobs[0])
    begun = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda job: stream(served, job), jobs))
    seconds = time.monotonic() - begun
    lost = sum(not (f["done"] and f["finish"] and f["status"] == 200) for f in found)
    mixed = sum(f["text"] != job["want"] for f, job in zip(found, jobs, strict=True))
    firsts = sorted(f["first"] for f in found if f["first"] is not None)
    rate = sum(f.get("tokens", 0) for f in found) / seconds
    return [
        f"| requests, streaming clients | {len(jobs)}, {clients} |",
        f"| lost (no finish_reason, no `[DONE]`, not 200) | {lost} |",
        f"| answers that differ from the sequential greedy one | {mixed} |",
        f"| time to first token, median / 95 % / longest | {statistics.median(firsts):.2f} s / "
        f"{firsts[int(len(firsts) * 0.95)]:.2f} s / {firsts[-1]:.2f} s |",
        f"| new tokens a second, all clients together | {rate:.1f} |",
        f"| new tokens a second, transformers' `generate`, one request after another | {sequential:.1f} |",
        f"| ratio | {rate / sequential:.2f} |",
    ]


def bench_lm_eval(served: Served, base_path: str, base: str, run: str, name: str, terms: list[str]) -> list[str]:
    """Rows: each model through the server and in process, on the same pairs."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    labels = ["Respiratory", "Injury", "Infections", "Pregnancy"]
    pairs = [(f"Condition: {term}\nICD-10 chapter:", f" {label}") for term in terms[:12] for label in labels]
    rows = []
    for model, peft in ((base, None), (name, f"{run}/adapter")):
        local = HFLM(pretrained=base_path, peft=peft, device="cpu", dtype="float32", batch_size=1)
        want = local.loglikelihood(requests_of("loglikelihood", pairs))
        remote = LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{served.port}/v1/completions", model=model, tokenizer=base_path,
            tokenizer_backend="huggingface", batch_size=8, num_concurrent=1, max_retries=1,
        )  # fmt: skip
        got = remote.loglikelihood(requests_of("loglikelihood", pairs))
        largest = max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True))
        greedy = sum(a != b for (_, a), (_, b) in zip(got, want, strict=True))
        choices = [
            [max(range(4), key=lambda k, i=i: scores[i + k][0]) for i in range(0, len(pairs), 4)]  # type: ignore[misc]
            for scores in (got, want)
        ]
        changed = sum(a != b for a, b in zip(*choices, strict=True))
        rows.append(f"| {model} | {len(pairs)} | {largest:.1e} | {greedy} | {changed} of {len(pairs) // 4} |")
    return rows


def abuse(served: Served, kind: int, models: list[str]) -> int:
    """One hostile request; its status, 0 where the client went away before one came."""
    chat = {"model": models[kind % len(models)], "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 64}
    path = "/v1/chat/completions"
    bad: list[Any] = [
        b'{"a": "' + b"x" * 2**21 + b'"}', b"{" * 50_000, b"\xff\xfe{}", {**chat, "n": 10**9},
        {**chat, "max_tokens": "many"}, {**chat, "messages": [{"role": "user", "content": ["x"] * 5000}]},
        {**chat, "model": "../../etc/passwd"}, {**chat, "chat_template": "{% for i in range(9**9) %}x{% endfor %}"},
        {**chat, "logit_bias": {str(i): 1 for i in range(5000)}}, {**chat, "stop": ["x"] * 5000},
        {**chat, "temperature": float("nan")}, {**chat, "messages": [{"role": "user", "content": "a " * 200_000}]},
    ]  # fmt: skip
    if kind % 16 < len(bad):
        try:
            return served.call("POST", path, bad[kind % 16])[0]
        except (BrokenPipeError, ConnectionResetError):
            # The answer to a body over the cap comes, and the connection goes, before the body is sent.
            return 413
    body = json.dumps({**chat, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as raw:
        match kind % 16:
            case 12:  # gone in the middle of a stream
                raw.sendall(head.encode() + body)
                raw.recv(300)
            case 13:  # reads nothing for a while
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                raw.sendall(head.encode() + body)
                time.sleep(1.0)
            case 14:  # half a body
                raw.sendall(head.encode() + body[: len(body) // 2])
            case _:  # no HTTP at all
                raw.sendall(random.Random(kind).randbytes(400) + b"\r\n\r\n")
                answer = raw.recv(64)
                return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0
    return 0


def bench_abuse(served: Served, number: int, jobs: list[dict[str, Any]], models: list[str]) -> list[str]:
    # What a first time costs (threads, caches of the tokenizer and of kernels) is no leak, so as many requests as
    # fill the caches come before; both figures are taken behind the same 8 answers.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: abuse(served, i, models), range(WARM_UP)))
    for job in jobs[:8]:
        stream(served, job)
    _wait_idle(served)
    before = served.rss_mib
    peak = [before]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            peak.append(served.rss_mib)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda i: abuse(served, i, models), range(number)))
    _wait_idle(served)
    over.set()
    watcher.join()
    wrong = [s for s in statuses if s and not (400 <= s < 500 or s == 503)]
    right = sum(stream(served, job)["text"] == job["want"] for job in jobs[:8])
    _wait_idle(served)
    after = served.rss_mib
    counts = {s: statuses.count(s) for s in sorted(set(statuses))}
    return [
        f"| hostile requests | {number} |",
        f"| by status (0: the client had gone) | {', '.join(f'{s}: {n}' for s, n in counts.items())} |",
        f"| other than 4xx and 503 | {len(wrong)} |",
        f"| resident memory before, at its peak, after | {before:.0f}, {max(peak):.0f}, {after:.0f} MiB "
        f"({(after / before - 1) * 100:+.1f} %) |",
        f"| right answers afterwards | {right} of 8 |",
    ]


def _wait_idle(served: Served) -> None:
    for _ in range(600):
        if b"metier_requests_running 0\n" in served.call("GET", "/metrics")[1]:
            break
        time.sleep(0.2)
    time.sleep(1.0)


def bench_term(served: Served, job: dict[str, Any]) -> list[str]:
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(stream, served, job) for _ in range(4)]
        time.sleep(0.5)
        code = served.stop()
        whole = sum(r.result()["done"] and r.result()["text"] == job["want"] for r in running)
    return [f"| `kill -TERM` with 4 streams under way: exit code, whole answers | {code}, {whole} of 4 |"]


def machine(args: argparse.Namespace) -> str:
    import transformers

    where = torch.cuda.get_device_name(0) if args.device == "cuda" else f"{os.cpu_count()} CPU cores"
    load_now = "/".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"{platform.system()} {platform.machine()}, {where}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {args.precision}; load average {load_now} at the start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--timed", type=int, default=48, help="requests that are timed one after another")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--abuse", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--skip", nargs="*", default=[], choices=["conformance", "lm-eval", "load", "abuse"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(Path(args.runs[0]) / "adapter") or {}
    base, base_path = str(manifest["base"]["name"]), str(load_path(manifest))
    records = pl.read_parquet(Path(args.runs[0]) / "dataset" / "records.parquet").filter(pl.col("split") == "test")
    terms = [m[-2]["content"] for m in records["messages"].to_list()]
    models: dict[str, str | None] = {Path(base).name: None, "one": args.runs[0], "two": args.runs[1]}
    lines = ["# Serving", "", machine(args), ""]
    served = Served([f"one={args.runs[0]}", f"two={args.runs[1]}"], args)
    target = Target(f"http://127.0.0.1:{served.port}", Path(base).name, ["one", "two"], base_path)
    if "conformance" not in args.skip:
        results = run_cases(target)
        lines += ["| client | cases | pass |", "|---|---:|---:|"]
        for driver in sorted({r["driver"] for r in results}):
            mine = [r for r in results if r["driver"] == driver]
            lines.append(f"| {driver} | {len(mine)} | {sum(not r['wrong'] for r in mine)} |")
        lines += ["", *(f"- FAILED {r['driver']}: {r['case']}: {r['wrong']}" for r in results if r["wrong"]), ""]
    if "lm-eval" not in args.skip:
        lines += ["| lm-eval | pairs | largest difference, nats | greedy marks that differ | choices that differ |"]
        lines += [
            "|---|---:|---:|---:|---:|",
            *bench_lm_eval(served, base_path, target.base, args.runs[0], "one", terms),
            "",
        ]
    jobs = make_jobs(args.requests, list(models), terms, args.max_tokens)
    sequential = alone(models, base, jobs if "load" not in args.skip else jobs[:8], args)
    lines += ["| | |", "|---|---|"]
    if "load" not in args.skip:
        lines += bench_load(served, jobs, args.clients, sequential)
    if "abuse" not in args.skip:
        lines += bench_abuse(served, args.abuse, jobs, list(models))
    lines += bench_term(served, jobs[0])
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def load_path(manifest: dict[str, Any]) -> Path:
    from metier.model.resolve import resolve_base

    return resolve_base(manifest["base"]["name"], manifest["base"].get("revision"))


if __name__ == "__main__":
    main()
