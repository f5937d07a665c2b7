"""Real vocabularies on tiny random models, as GGUF, in llama.cpp: the same token ids, and the same greedy answers?

python benchmarks/bench_export_tokenizers.py --llama-python PYTHON llama2=FOLDER llama3=FOLDER

FOLDER holds a tokenizer.json (scripts/fetch_llama2_tokenizer.py fetches LLaMA 2's); PYTHON has llama-cpp-python. The
model of hidden size 64 has random weights: what is tried is the vocabulary, the rotary layout and its scaling.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from metier.model.generate import SamplingParams, generate_ids
from metier.model.load import load_base, load_tokenizer
from metier.model.specialist import Specialist
from metier.serving.gguf_weights import write_model
from metier.serving.merge import merged_weights
from tests.model.tiny import FORMATS, TEMPLATES, tiny_model

CHILD = Path(__file__).with_name("llama_cpp_answers.py")
TEXTS = [
    "Hello world", "  two  spaces\n\ttab", "你好，世界 12345 3.14", "é😀 naïve", "patient's A&E visit\r\n\r\nend",
    " leading",
    "I'll we've DON'T 1234567",
    "[INST] hi [/INST] yes", "\n\n\n", "a\n b", "ICD-10: Z99.89 (β-blocker)", "该公司第三季度营业收入",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizers", nargs="+", help="KIND=FOLDER, KIND one of tests/model/tiny.py's")
    parser.add_argument("--llama-python", type=Path, required=True)
    options = parser.parse_args()
    print("| vocabulary | texts with the same ids | same greedy answers |\n|---|---:|---:|")
    for word in options.tokenizers:
        kind, _, folder = word.partition("=")
        tokenizer = load_tokenizer(Path(folder))
        tokenizer.chat_template = TEMPLATES[FORMATS[kind]]
        with tempfile.TemporaryDirectory() as scratch:
            base = Path(scratch) / "base"
            model, _ = tiny_model(kind)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
            ours = Specialist(load_base(base, dtype=torch.float32, device=torch.device("cpu")))
            path = Path(scratch) / "model.gguf"
            write_model(path, merged_weights(ours), ours, form="f32", name=kind)
            ids = [ours.renderer.encode(text) for text in TEXTS]
            stop = sorted(ours.renderer.stop_token_ids)
            prompts = [{"text": text, "ids": i} for text, i in zip(TEXTS, ids, strict=True)]
            asked = {"model": str(path), "lora": None, "prompts": prompts, "stop": stop, "max_tokens": 8}
            done = subprocess.run(
                [options.llama_python, CHILD], input=json.dumps(asked), capture_output=True, text=True, check=True
            )
            params = SamplingParams(max_new_tokens=8)
            mine = dict(generate_ids(ours.base, ids, params, stop_token_ids=frozenset(stop), batch_size=4))
        theirs = json.loads(done.stdout)
        same = sum(answer["ids"] == i for answer, i in zip(theirs, ids, strict=True))
        greedy = sum(a["answer"] == [t for t in mine[n] if t not in stop] for n, a in enumerate(theirs))
        print(f"| {kind}, {len(tokenizer):,} tokens | {same} of {len(TEXTS)} | {greedy} of {len(TEXTS)} |")


if __name__ == "__main__":
    main()
