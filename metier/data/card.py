"""The data set's manifest -> DATA_CARD.md: a Hugging Face data set card with every count, in English and Chinese.

The YAML front matter is what the Hub reads (size, languages, task, where the files are); no record text is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from metier.data.deidentify.card import privacy_section, privacy_section_zh
from metier.reasons import in_chinese

_BESIDE_HAN = re.compile(r"(?<=[\u4e00-\u9fff])[,:;()]|[,:;()](?=[\u4e00-\u9fff])")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def data_card(details: dict[str, Any]) -> str:
    """The card's Markdown; `details` are the entries of the manifest that `prepare` makes."""
    counts, splits, languages = details["counts"], details["splits"], details["languages"]
    labels = f", {len(details['labels'])} labels" if details["labels"] else ""
    roles = "".join(f"| {_cell(k)} | {_cell(v)} |\n" for k, v in details["roles"].items() if k != "how")
    sources = "".join(
        f"| {_cell(s['file'])} | {s['format']} | {s['rows']} | {s['kept']} | {s['merged']} | {s['rejected']} "
        f"| `{s['sha256'][:16]}` |\n"
        for s in details["sources"]
    )
    split_rows = "".join(f"| {name} | {count} |\n" for name, count in splits.items())
    how = "named in the recipe" if details["roles"]["how"] == "recipe" else "found by the columns' names"
    english = f"""{_front_matter(details)}
# Data set

{counts["rows"]} source rows: {counts["kept"]} kept as records, {counts["merged"]} merged into others, \
{counts["rejected"]} rejected.
Task: {details["task"]}{labels}.
Languages: {languages["zh"]} Chinese, {languages["en"]} English, {languages["other"]} other records.

| split | records |
|---|---:|
{split_rows}
No group stands in two splits: a group is all records with the same group_id or the same first prompt{_joined(details)}.
The order of the groups is that of SHA-256(seed | group), with seed {details["seed"]};
each label has its share of every split as far as the groups allow.

## Leakage

{_leakage(details["leakage"])}
## Copies

Rows merged into others: {counts["merged"]} (`merged.parquet`). Near-duplicate pairs: {details["near_duplicate_pairs"]}.
Pairs with the same or nearly the same text and different labels: {details["label_conflicts"]} (`conflicts.parquet`).
{counts["synthetic"]} synthetic records, all in train, each with the record it was made of{_methods(details)}.
{_paraphrases(details)}{_weights(details)}{_domain(details)}
{privacy_section(details["privacy"])}
## Sources

| file | format | rows | kept | merged | rejected | SHA-256 begins |
|---|---|---:|---:|---:|---:|---|
{sources}
{_written(details["sources"])}
## Roles ({how})

| role | column, template or text |
|---|---|
{roles}
## Rejected rows

| reason | rows | such as (file:row) |
|---|---:|---|
{_rejected(details) or "| none | 0 | |" + chr(10)}
Each one is in `rejected.parquet` with its file, row and byte offset.

## What was changed

Whitespace around prompts, answers and template columns is taken off; numbers and booleans become the text they are
written in; empty system messages are left out. {_cleaning(details["cleaning"])}
Personal data: as said above. The licence of the sources is the concern of whoever gave them.
"""
    return f"{english}\n{_full_width(_chinese(details))}"


def _full_width(text: str) -> str:
    """Punctuation beside Chinese characters as Chinese is written."""
    return _BESIDE_HAN.sub(lambda match: "，：；（）"[",:;()".index(match[0])], text)


def _chinese(details: dict[str, Any]) -> str:
    """What the card says, for those who read Chinese."""
    counts, splits, languages = details["counts"], details["splits"], details["languages"]
    shared, by_row = details["leakage"]["shared_with_train"], details["leakage"]["if_split_by_row"]
    is_searched = details["leakage"]["near_duplicates_searched"]
    near = f",近似重复 {shared['near_duplicate']} 条" if is_searched else ""
    near_by_row = f"、{by_row['near_duplicate']}" if is_searched else ""
    return f"""## 中文说明

源数据共 {counts["rows"]} 行:保留 {counts["kept"]} 条记录,合并重复 {counts["merged"]} 行,拒绝 {counts["rejected"]} 行。
{_rejected_zh(details)}逐行见 `rejected.parquet`。
训练集 {splits["train"]} 条,验证集 {splits["val"]} 条,测试集 {splits["test"]} 条。
同一组不会跨越划分:group_id 相同{"、首个提示相同或近似重复" if is_searched else "或首个提示相同"}的记录同属一组\
{"" if is_searched else "(未查找近似重复)"}。
文本相同或近似而标签不同的记录 {details["label_conflicts"]} 对,见 `conflicts.parquet`。
与训练集重合的验证、测试记录:\
提示相同 {shared["prompt"]} 条,同组 {shared["group_id"]} 条{near};
若按行随机划分,则分别为 {by_row["prompt"]}、{by_row["group_id"]}{near_by_row} 条。
合成记录 {counts["synthetic"]} 条,全部在训练集中,并注明来源记录。
语言:中文 {languages["zh"]} 条,英文 {languages["en"]} 条,其他 {languages["other"]} 条。
{privacy_section_zh(details["privacy"])}
去除提示与答案首尾的空白,略去空的系统消息;此外只有上表中设置为 on 的清洗规则改动文本:
control 去除控制字符与零宽字符,whitespace 统一换行与空格,width 将全角字母、数字、百分号与全角句点转为半角
(中文标点不变),html 去除标签,script 转换简繁,boilerplate 涉及多条记录共有的首行或末行。
"""


def _rejected(details: dict[str, Any], told: Callable[[str], str] = str) -> str:
    """The table's rows: each reason as it is `told`, its rows, and the places of the first."""
    examples = details.get("rejected_examples", {})
    return "".join(
        f"| {_cell(told(reason))} | {count} | {_cell(', '.join(examples.get(reason, [])))} |\n"
        for reason, count in details["rejected_by_reason"].items()
    )


def _rejected_zh(details: dict[str, Any]) -> str:
    rows = _rejected(details, in_chinese)
    return f"\n| 拒绝的原因 | 行数 | 例如(文件:行) |\n|---|---:|---|\n{rows}\n" if rows else ""


def _front_matter(details: dict[str, Any]) -> str:
    """The YAML that the Hub reads; the splits are a column of the one file."""
    size = next((name for limit, name in SIZES if details["counts"]["kept"] < limit), "n>1M")
    category = "text-classification" if details["task"] == "classification" else "text-generation"
    return f"""---
language: {json.dumps([code for code in ("en", "zh") if details["languages"][code]])}
task_categories: [{category}]
size_categories: ["{size}"]
license: unknown
configs:
- config_name: default
  data_files: records.parquet
---
"""


def _written(sources: list[dict[str, Any]]) -> str:
    """How each file is written, where that had to be found out."""
    return "".join(
        f"{_cell(s['file'])}: {'; '.join(_cell(s[k]) for k in ('encoding', 'dialect', 'note') if k in s)}.\n"
        for s in sources
        if "encoding" in s or "note" in s
    )


def _cleaning(rules: dict[str, dict[str, Any]]) -> str:
    """The rules with what they did, and what they mean."""
    rows = "".join(
        f"| {rule} | {_setting(found['setting'])} | {found['records']} | {_cell(', '.join(found['examples'][:2]))} |\n"
        for rule, found in rules.items()
    )
    return f"""Beside that:

| rule | setting | records it changed, found or left out | such as (file:row) |
|---|---|---:|---|
{rows}
control: control, zero-width and direction characters are taken out. whitespace: every line end is LF, every odd space a
space. width: full-width letters, digits, percent signs and full stops are half-width. html: tags and character
references are taken out. script: Chinese is converted to one script. boilerplate: first and last lines that many
records share. The other rules change no text: they find, or leave records out. Nothing else was changed, cut or
translated."""


def _setting(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _leakage(found: dict[str, Any]) -> str:
    """The certificate as a table and sentences."""
    kinds = {"prompt": "the same prompt", "group_id": "the same group_id", "near_duplicate": "a near-duplicate"}
    if not found["near_duplicates_searched"]:
        del kinds["near_duplicate"]
    rows = "".join(
        f"| {words} | {found['shared_with_train'][kind]} | {found['if_split_by_row'][kind]} |\n"
        for kind, words in kinds.items()
    )
    benchmarks = "".join(
        f"Records that share a passage with {_cell(name)}: {entry['records_rejected']}, rejected.\n"
        for name, entry in found["benchmarks"].items()
    )
    searched = (
        f"Near-duplicates have a Jaccard similarity of {found['threshold']:g} or more;\na last search with other "
        f"hashes took out {found['found_late']} records."
        if found["near_duplicates_searched"]
        else "Near-duplicates were not looked for."
    )
    return f"""Held-out records (val and test, {found["held_out_records"]} in all) that share with training:

| what | this split | if split row by row |
|---|---:|---:|
{rows}
{searched}
Test records that quote a training record ({found["passage_chars"]["other"]} characters in a row, in Chinese
{found["passage_chars"]["zh"]}): {found["test_records_with_a_passage_of_train"]}.
{benchmarks}"""


def _joined(details: dict[str, Any]) -> str:
    return ", joined with\ntheir near-duplicates" if details["leakage"]["near_duplicates_searched"] else ""


def _methods(details: dict[str, Any]) -> str:
    found = ", ".join(f"{method} {count}" for method, count in details["synthetic_by_method"].items())
    return f": {found}" if found else ""


def _paraphrases(details: dict[str, Any]) -> str:
    found = details.get("paraphrases")
    if not found or not found["asked"]:
        return ""
    refused = ", ".join(f"{reason} {count}" for reason, count in found["refused"].items()) or "none"
    return (
        f"The base model was asked to rewrite {found['asked']} prompts, and {found['kept']} of its rewritings were "
        f"faithful; refused by what differed: {refused}.\n"
    )


def _weights(details: dict[str, Any]) -> str:
    weights = details.get("class_weights")
    if not weights:
        return ""
    low, high = min(weights.values()), max(weights.values())
    return f"Training records weigh by their label, from {low:g} to {high:g}; the other splits do not.\n"


def _domain(details: dict[str, Any]) -> str:
    found = details.get("domain")
    if not found:
        return ""
    return (
        f"Domain {found['name']}: {found['terms_found']} of {found['terms']} terms of its glossary stand in "
        f"{found['records_with_a_term']} records.\n"
    )


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
