"""Are metier's log-probabilities lm-eval's? The same model in one process, the same token ids, fp32.

    python benchmarks/bench_lm_eval.py [items]

lm-eval's HFLM gets the loaded model; its `_loglikelihood_tokens` gets each prompt and choice of the built-in general
questions as ids (its `loglikelihood` would move the template's last line break to the answer). Prints the table of
benchmarks/results/lm_eval_cpu2_202611.md.
"""

from __future__ import annotations

import sys

import numpy as np
from lm_eval.models.huggingface import HFLM

from metier.evaluation.probes import load_probes
from metier.model.specialist import load


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    probes = [p for p in load_probes() if p["kind"] == "choice"][:count]
    specialist = load("smollm2-135m", precision="fp32", device="cpu")
    theirs_model = HFLM(pretrained=specialist.base.model, tokenizer=specialist.base.tokenizer, batch_size=4)
    ours, theirs, chosen = [], [], []
    for probe in probes:
        question, *options = probe["options"]
        mine = specialist.score([question] * len(options), options)
        requests = []
        for option in options:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": option}]
            ids, positions = specialist._answer(turns)
            requests.append(((question, option), ids[: positions[0]], [ids[t] for t in positions[:-1]]))
        their = [value for value, _ in theirs_model._loglikelihood_tokens(requests, disable_tqdm=True)]
        ours += mine
        theirs += their
        chosen.append((int(np.argmax(mine)) == 0, int(np.argmax(their)) == 0))
    trie = np.concatenate([
        specialist.score_choices([p["options"][0]], p["options"][1:])[0] for p in probes
    ])  # fmt: skip
    difference = np.abs(np.array(ours) - np.array(theirs))
    right = np.array(chosen)
    print("| items | choices | accuracy: metier, lm-eval | same choice | largest difference, nats | of the trie |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {len(probes)} | {len(ours)} | {right[:, 0].mean():.4f}, {right[:, 1].mean():.4f} | "
        f"{int((right[:, 0] == right[:, 1]).sum())} | {difference.max():.1e} | "
        f"{np.abs(trie - np.array(theirs)).max():.1e} |"
    )


if __name__ == "__main__":
    main()
