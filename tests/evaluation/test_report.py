"""Tries to smuggle markup, scripts, formulas and text direction into the report and the card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from metier.errors import RunError
from metier.evaluation.card import write_card
from metier.evaluation.report import write_report
from metier.model.specialist import Specialist

from .conftest import Row, classified, judge

Make = Callable[..., Path]
HOSTILE = [
    "<script>alert(1)</script>",
    "</text></svg><img src=x onerror=alert(1)>",
    '=HYPERLINK("http://example.com")',
    r"$\frac{1}{$ | x | {{ 7 * 7 }} [[0]]",
    "\u202eevil\u2066 العربية",
    "普通的标签",
]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def rows(labels: list[str], language: str = "en") -> list[Row]:
    prompt = f"{HOSTILE[0]} {HOSTILE[1]} {'long ' * 80}"
    made = [
        *classified(60, "train", labels, language),
        *classified(6, "val", labels, language),
        *classified(48, "test", labels, language, prompt=prompt),
    ]
    # Two sources, so that there are slices, one with a hostile name.
    return [{**row, "source_file": ("a.csv", HOSTILE[1])[i % 2]} for i, row in enumerate(made)]


def report(run: Path, specialist: Specialist) -> str:
    judge(run, specialist)
    write_report(run)
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_hostile_text_is_inert_in_the_report(make_run: Make, specialist: Specialist, task: str) -> None:
    page = Page(report(make_run(rows(HOSTILE), task), specialist))
    assert page.open == []
    assert not {"script", "img", "iframe", "object", "link", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = "".join(page.words)
    assert HOSTILE[0] in text
    assert r"$\frac{1}{$ | x | {{ 7 * 7 }} [[0]]" in text
    if task == "generation":
        # Its answers all differ, so that the prompts stand among the gains and losses.
        assert "(cut at 300 characters)" in text
        assert "<img src=x onerror=alert(1)>" in text


def test_report_asks_for_nothing_outside_itself(make_run: Make, specialist: Specialist) -> None:
    html = report(make_run(rows(["a", "b"])), specialist)
    page = Page(html)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)", html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_report_ids_are_unique_and_every_figure_and_table_has_a_caption(make_run: Make, specialist: Specialist) -> None:
    page = Page(report(make_run(rows(["a", "b", "c"])), specialist))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("svg") == 7
    assert page.tags.count("table") == page.tags.count("caption")
    references = re.findall(
        r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', (" ".join(f'{n}="{v}"' for n, v in page.attributes))
    )
    assert {a or b for a, b in references} <= set(ids)


def test_report_speaks_the_language_of_the_records(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows(["民事", "刑事"], "zh"))
    html = report(run, specialist)
    assert '<html lang="zh-CN">' in html
    assert "局限" in html and "Limits" not in html
    card = write_card(run).read_text(encoding="utf-8")
    assert "## 局限" in card


def test_two_reports_of_one_run_are_equal(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows(["a", "b"]))
    first = report(run, specialist)
    assert write_report(run) == ["report.html", "report.zh.html"]
    assert (run / "report.html").read_text(encoding="utf-8") == first


@pytest.mark.parametrize("task", ["generation", "text"])
def test_report_of_other_tasks_has_what_there_is(make_run: Make, specialist: Specialist, task: str) -> None:
    made = [{**row, "label": None} for row in rows(["a", "b"])]
    if task == "text":
        made = [{**row, "messages": [{"role": "text", "content": row["messages"][0]["content"]}]} for row in made]
    run = make_run(made, task=task)
    page = Page(report(run, specialist))
    assert page.open == []
    assert "Would something simpler do?" not in "".join(page.words)
    write_card(run)


def test_what_got_worse_what_is_better_and_what_is_empty_stands_on_the_page(
    make_run: Make, specialist: Specialist
) -> None:
    run = make_run(rows(["a", "b"]))
    judge(run, specialist)
    path = run / "evidence" / "evidence.json"
    evidence = json.loads(path.read_text(encoding="utf-8"))
    evidence["behaviour"]["empty_share"] |= {"adapter": 1.0, "outcome": "worse"}
    evidence["controls"]["majority_class"]["outcome"] = "worse"
    path.write_text(json.dumps(evidence), encoding="utf-8")
    write_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert re.search("does worse than the base model: [^<]*Empty answers[.;]", page)
    assert re.search("Always the most frequent label: [^<]*better than the specialised model", page)
    assert "Some answers are empty, and count as wrong:" in page
    chinese = (run / "report.zh.html").read_text(encoding="utf-8")
    assert "部分回答为空" in chinese and "优于专用模型" in chinese and "不如基础模型之处" in chinese


def test_every_source_row_is_accounted_for_on_the_page(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows(["a", "b"]))
    judge(run, specialist)
    path = run / "dataset" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["counts"] = {"rows": 999, "kept": 900, "merged": 77, "rejected": 22, "synthetic": 0}
    manifest["privacy"] = {"replaced": {"PERSON": {"count": 1234, "operator": "label"}}}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    write_report(run)
    page = " ".join(Page((run / "report.html").read_text(encoding="utf-8")).words)
    assert re.search(r"Merged into an equal record\s+77\s", page)
    assert re.search(r"PERSON\s+1,234\s", page)
    assert re.search(r"answer is empty\s+2\s", page)
    chinese = " ".join(Page((run / "report.zh.html").read_text(encoding="utf-8")).words)
    assert re.search(r"回答为空\s+2\s", chinese)


def test_run_without_evidence_is_refused(make_run: Make) -> None:
    run = make_run(rows(["a", "b"]))
    with pytest.raises(RunError, match="no complete evidence"):
        write_report(run)


def test_card_front_matter_is_a_model_index_without_local_paths(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows(HOSTILE))
    judge(run, specialist)
    text = write_card(run).read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["library_name"], card["base_model"], card["language"]) == ("peft", "tiny", ["en"])
    names = {m["type"] for m in card["model-index"][0]["results"][0]["metrics"]}
    assert {"accuracy", "f1", "perplexity"} <= names
    assert "/home/someone" not in text
    assert "<script" not in body


def test_card_is_accepted_by_the_hub_library(make_run: Make, specialist: Specialist) -> None:
    from huggingface_hub import ModelCard

    run = make_run(rows(["a", "b"]))
    judge(run, specialist)
    results = ModelCard.load(write_card(run)).data.eval_results
    assert results is not None
    assert {r.metric_type for r in results} >= {"accuracy", "f1"}
