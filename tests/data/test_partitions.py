"""Tries to make the data set depend on who worked: one process, several, a Ray cluster; or to lose a worker."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from metier.artifacts import digest_file
from metier.data.partitions import FEW, Workers, parts
from metier.data.prepare import prepare
from metier.errors import DataError, RunError
from metier.recipe import Recipe
from metier.recipe.scale import ScaleConfig

FILES = ("records", "rejected", "merged", "conflicts", "subjects")


def squares(part: Sequence[int], plus: int) -> list[int]:
    time.sleep(0.01 * (part[0] % 3))  # later partitions are done first
    return [number * number + plus for number in part]


def refuse(part: Sequence[int]) -> None:
    raise DataError(f"{part[0]} is refused", hint="try another")


def die(part: Sequence[int]) -> None:
    os._exit(9)


def own_process(part: Sequence[int]) -> int:
    return os.getpid()


@pytest.fixture(scope="module")
def two() -> Iterator[Workers]:
    with Workers(ScaleConfig(workers=2)) as workers:
        yield workers


def test_results_come_in_the_order_of_the_partitions(two: Workers) -> None:
    numbers = list(range(95))
    found = [n for part in two.map(squares, parts(numbers, 10), 1) for n in part]
    assert found == [n * n + 1 for n in numbers]
    assert os.getpid() not in set(two.map(own_process, parts(numbers, 10)))


def test_the_sentence_of_a_worker_reaches_the_user(two: Workers) -> None:
    with pytest.raises(DataError, match="0 is refused") as caught:
        list(two.map(refuse, parts([0, 1], 1)))
    assert caught.value.hint == "try another"


def test_few_records_start_no_process_in_however_many_partitions() -> None:
    with Workers(ScaleConfig()) as workers:
        assert set(workers.map(own_process, parts(range(FEW - 1), 100))) == {os.getpid()}
        assert set(workers.map(own_process, ([1] for _ in range(50)))) == {os.getpid()}


def test_a_killed_worker_is_a_sentence() -> None:
    with Workers(ScaleConfig(workers=2)) as workers, pytest.raises(RunError, match="worker process ended"):
        list(workers.map(die, parts([0, 1], 1)))


def test_workers_end_with_the_process_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text(
        "import os, signal\nfrom metier.data.partitions import Workers\nfrom metier.recipe.scale import ScaleConfig\n"
        "from tests.data.test_partitions import own_process\n"
        "if __name__ == '__main__':\n"
        "    with Workers(ScaleConfig(workers=2)) as workers:\n"
        "        print(*set(workers.map(own_process, [[n] for n in range(40)])), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # Not the streams of this test: what inherits them would keep them open.
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, str(script)], env=environment, stdout=out, stderr=out)
    pids = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    end = time.monotonic() + 20
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def write_sources(folder: Path) -> list[str]:
    """Two files of 3,000 rows in all: some broken, copied, nearly copied, in two languages, with people in them."""
    rng = random.Random(3)
    words = ["fever", "cough", "pain", "acute", "chronic", "renal", "wrist", "femur", "left", "right", "severe", "mild"]
    lines = [f"{' '.join(rng.choices(words, k=12))} {i},{rng.choice('aab')},p{i % 900}" for i in range(1500)]
    lines[7] = "only one field"
    lines += [lines[3], lines[4].replace(" ", "  ", 1), lines[5].upper()]
    (folder / "en.csv").write_text("text,label,person\n" + "\n".join(lines) + "\n")
    zh = [
        f'{{"text": "患者王小明第{i}次就诊,电话1380013{i:04d},主诉发热{i % 7}天", "label": "a"}}' for i in range(1500)
    ]
    zh[9] = '{"text": '
    (folder / "zh.jsonl").write_text("\n".join(zh) + "\n", encoding="utf-8")
    return [str(folder / "en.csv"), str(folder / "zh.jsonl")]


def digests(sources: list[str], out: Path, scale: ScaleConfig) -> list[str]:
    recipe = Recipe.model_validate(
        {
            "base": "none", "out": "nowhere", "domain": "medicine", "scale": scale,
            "data": {"sources": sources, "prompt": "text", "answer": "label"},
            "balance": {"classes": "oversample"}, "augment": {"methods": ["instruction", "typo"]},
            "clean": {"boilerplate": "remove", "contradictions": "majority"},
        }
    )  # fmt: skip
    manifest = prepare(recipe, out=out / "dataset", progress=lambda line: None)
    return [manifest["digest"], *(digest_file(out / "dataset" / f"{name}.parquet") for name in FILES)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """(sources, digests) of one process."""
    folder = tmp_path_factory.mktemp("alone")
    sources = write_sources(folder)
    return sources, digests(sources, folder, ScaleConfig(workers=1))


def test_any_number_of_workers_makes_the_same_bytes(alone: tuple[list[str], list[str]], tmp_path: Path) -> None:
    sources, expected = alone
    assert digests(sources, tmp_path / "3", ScaleConfig(workers=3)) == expected


def test_a_ray_cluster_of_two_nodes_makes_the_same_bytes(alone: tuple[list[str], list[str]], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    code = (
        "import sys\nfrom pathlib import Path\nfrom ray.cluster_utils import Cluster\n"
        "from tests.data.test_partitions import digests\nfrom metier.recipe.scale import ScaleConfig\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1, 'include_dashboard': False})\n"
        "cluster.add_node(num_cpus=1)\n"
        "print(*digests(sys.argv[2:], Path(sys.argv[1]), ScaleConfig(ray=cluster.address)))\n"
        "cluster.shutdown()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *alone[0]], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-len(alone[1]) :] == alone[1]


def test_a_cluster_that_is_not_there_is_a_sentence() -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.raises(RunError, match="no Ray cluster answers"):
        Workers(ScaleConfig(ray="auto"))
