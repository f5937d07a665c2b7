"""Are the verdicts calibrated? Simulated test sets with a known truth, judged as a run's own are.

    python benchmarks/bench_verdicts.py [runs]        # 1,000 by default: some 10 minutes of one core
    python benchmarks/bench_verdicts.py --power       # how much any paired test could find: by calculation, seconds

Prints the table of benchmarks/results/verdicts_cpu_202611.md.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from math import exp, lgamma, log

import numpy as np

from metier.evaluation import metrics
from metier.evaluation.compare import Design, compare, power
from metier.evaluation.metrics import Metric

RESAMPLES = 2_000
Sample = tuple[Metric, list[str], float]


def right_or_wrong(n: int, base: float, gain: float, changed: float) -> Callable[[np.random.Generator], Sample]:
    """n independent items; the base is right on `base` of them, `changed` of all answers differ, net `gain`."""
    lost, won = (changed - gain) / 2, (changed + gain) / 2

    def draw(generator: np.random.Generator) -> Sample:
        first = generator.random(n) < base
        chance = generator.random(n)
        second = np.where(first, chance >= lost / base, chance < won / (1 - base))
        return metrics.proportion("m", first, second), [f"item {i}" for i in range(n)], gain

    return draw


def clustered(groups: int, size: int, gain: float, spread: float) -> Callable[[np.random.Generator], Sample]:
    """Groups whose difficulty varies, and in which the adapter helps by `gain` +- `spread`."""

    def draw(generator: np.random.Generator) -> Sample:
        level = np.repeat(generator.uniform(0.25, 0.65, groups), size)
        shift = np.repeat(generator.uniform(-spread, spread, groups), size) + gain
        first = generator.random(groups * size) < level
        second = generator.random(groups * size) < level + shift
        return metrics.proportion("m", first, second), [f"group {i // size}" for i in range(groups * size)], gain

    return draw


def perplexity(n: int, gain: float) -> Callable[[np.random.Generator], Sample]:
    """Nats per token with a shared difficulty of each item."""

    def draw(generator: np.random.Generator) -> Sample:
        tokens = generator.integers(5, 60, n).astype(float)
        hard = generator.normal(2, 0.6, n)
        sides = [
            np.stack([tokens * (hard - g) + np.sqrt(tokens) * generator.normal(0, 0.8, n), tokens], axis=1)
            for g in (0.0, gain)
        ]
        metric = Metric("m", sides[0], sides[1], metrics.bits_per_byte, higher_is_better=False)
        return metric, [f"item {i}" for i in range(n)], -gain / float(np.log(2))

    return draw


def cases() -> Iterator[tuple[str, Callable[[np.random.Generator], Sample]]]:
    for n in (100, 300, 1000):
        for changed in (0.05, 0.25):
            yield f"no difference, {n} items, {changed:.0%} changed", right_or_wrong(n, 0.6, 0.0, changed)
    yield "no difference, 300 items, rare hits (3 %)", right_or_wrong(300, 0.03, 0.0, 0.03)
    yield "no difference, 40 groups of 15", clustered(40, 15, 0.0, 0.2)
    yield "no difference, 100 groups of 5", clustered(100, 5, 0.0, 0.2)
    yield "no difference, bits per byte, 200 items", perplexity(200, 0.0)
    for changed in (0.15, 0.25, 0.4):
        yield f"+5 points, 1,000 items, {changed:.0%} changed", right_or_wrong(1000, 0.6, 0.05, changed)
    yield "+10 points, 300 items, 30 % changed", right_or_wrong(300, 0.5, 0.1, 0.3)
    yield "+10 points, 40 groups of 15", clustered(40, 15, 0.1, 0.2)
    yield "+10 points, 100 groups of 10", clustered(100, 10, 0.1, 0.2)


def best_power(n: int, changed: float, gain: float, *, randomised: bool) -> float:
    """Power of the exact two-sided 5 % test of `n` pairs of which a share `changed` differ, with net `gain`.

    Given the number of discordant pairs m, those lost are binomial(m, 1/2) without a difference. `randomised` adds the
    boundary's share, so that the level is 5 % exactly: the uniformly most powerful unbiased test (Lehmann and Romano,
    Testing Statistical Hypotheses, section 4.4), which no unbiased two-sided test of right-or-wrong pairs exceeds.
    """
    lost, total = (changed - gain) / 2 / changed, 0.0
    for m in range(n + 1):
        weight = pmf(m, n, changed)
        if weight < 1e-12:
            continue
        tail, k = 0.0, 0
        found = 0.0
        while k < m / 2 and tail + (here := pmf(k, m, 0.5)) <= 0.025:
            tail, found, k = tail + here, found + pmf(k, m, lost) + pmf(m - k, m, lost), k + 1
        if randomised and k <= m / 2:
            share = min(1.0, (0.025 - tail) / pmf(k, m, 0.5))
            found += share * (pmf(k, m, lost) + (pmf(m - k, m, lost) if m - k != k else 0.0))
        total += weight * found
    return total


def printed(changed: float, gain: float) -> int:
    """`n_needed` of the evidence for such answers, judged on 1,000 independent items."""
    flags = np.zeros(1, dtype=bool)
    error = ((changed - gain**2) / 1000) ** 0.5
    return int(power(metrics.proportion("m", flags, flags), error, 1000, gain, is_exact=True)["n_needed"])


def pmf(k: int, n: int, p: float) -> float:
    """The binomial probability."""
    logs = lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
    return exp(logs + k * log(p) + (n - k) * log(1 - p))


def main() -> None:
    if sys.argv[1:] == ["--power"]:
        print("| items | answers changed | true difference | exact McNemar finds | most any unbiased test can find |")
        print("|---|---|---|---|---|")
        for n, changed in ((1000, 0.15), (1000, 0.25), (1000, 0.3), (1000, 0.31), (1000, 0.32), (1000, 0.4)):
            found = [best_power(n, changed, 0.05, randomised=r) for r in (False, True)]
            print(f"| {n:,} | {changed:.0%} | 5 points | {found[0]:.1%} | {found[1]:.1%} |")
        print("\n| answers changed | `n_needed` as printed | finds five points |\n|---|---|---|")
        for changed in (0.1, 0.15, 0.25, 0.3, 0.4, 0.6):
            needed = printed(changed, 0.05)
            print(f"| {changed:.0%} | {needed:,} | {best_power(needed, changed, 0.05, randomised=False):.1%} |")
        return
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000
    print("| truth | better | worse | no difference shown | not enough data | intervals that cover |")
    print("|---|---|---|---|---|---|")
    for name, draw in cases():
        generator = np.random.default_rng(20261124)
        outcomes: Counter[str] = Counter()
        covered = 0
        for seed in range(runs):
            metric, groups, truth = draw(generator)
            result = compare([metric], groups, Design(RESAMPLES, seed))["m"]
            outcomes[result["outcome"]] += 1
            covered += result["ci95"][0] <= truth <= result["ci95"][1]
        shares = [outcomes[o] / runs for o in ("better", "worse", "no difference shown", "not enough data")]
        print(f"| {name} | {' | '.join(f'{s:.1%}' for s in shares)} | {covered / runs:.1%} |", flush=True)


if __name__ == "__main__":
    main()
