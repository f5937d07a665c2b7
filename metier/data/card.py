"""The data set's manifest -> DATA_CARD.md: a Hugging Face data set card with every count, in English and Chinese.

The YAML front matter is what the Hub reads (size, languages, task, where the files are); no record text is in it.
"""

from __future__ import annotations

import json
from typing import Any

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def data_card(details: dict[str, Any]) -> str:
    """The card's Markdown; `details` are the entries of the manifest that `prepare` makes."""
    counts, splits, languages = details["counts"], details["splits"], details["languages"]
    labels = f", {len(details['labels'])} labels" if details["labels"] else ""
    roles = "".join(f"| {_cell(k)} | {_cell(v)} |\n" for k, v in details["roles"].items() if k != "how")
    sources = "".join(
        f"| {_cell(s['file'])} | {s['format']} | {s['rows']} | {s['kept']} | {s['rejected']} | `{s['sha256'][:16]}` |\n"
        for s in details["sources"]
    )
    reasons = "".join(f"| {_cell(reason)} | {count} |\n" for reason, count in details["rejected_by_reason"].items())
    split_rows = "".join(f"| {name} | {count} |\n" for name, count in splits.items())
    rules = "".join(
        f"| {rule} | {_setting(found['setting'])} | {found['records']} |\n"
        for rule, found in details["cleaning"].items()
    )
    written = "".join(
        f"{_cell(s['file'])}: {'; '.join(_cell(s[k]) for k in ('encoding', 'dialect', 'note') if k in s)}.\n"
        for s in details["sources"]
        if "encoding" in s
    )
    how = "named in the recipe" if details["roles"]["how"] == "recipe" else "found by the columns' names"
    english = f"""{_front_matter(details)}
# Data set

{counts["rows"]} source rows: {counts["kept"]} kept as records, {counts["rejected"]} rejected.
Task: {details["task"]}{labels}.
Languages: {languages["zh"]} Chinese, {languages["en"]} English, {languages["other"]} other records.

| split | records |
|---|---:|
{split_rows}
No group stands in two splits: a group is the recipe's group_id, or else all records with the same first prompt. The
order of the groups is that of SHA-256(seed | group), with seed {details["seed"]}.

## Sources

| file | format | rows | kept | rejected | SHA-256 begins |
|---|---|---:|---:|---:|---|
{sources}
{written}
## Roles ({how})

| role | column, template or text |
|---|---|
{roles}
## Rejected rows

| reason | rows |
|---|---:|
{reasons or "| none | 0 |" + chr(10)}
Each one is in `rejected.parquet` with its file, row and byte offset.

## What was changed

Whitespace around prompts, answers and template columns is taken off; numbers and booleans become the text they are
written in; empty system messages are left out. Beside that:

| rule | setting | records it changed or found |
|---|---|---:|
{rules}
control: control, zero-width and direction characters are taken out. whitespace: every line end is LF, every odd space a
space. width: full-width letters, digits and percent signs are half-width. html: tags and character references are taken
out. script: Chinese is converted to one script. boilerplate: first and last lines that many records share. The rules
mojibake and contradictions change no text. Nothing else was changed, cut or translated.
The licence and the personal data of the sources are the concern of whoever gave them: this card knows neither.
"""
    return f"{english}\n{_chinese(details)}"


def _chinese(details: dict[str, Any]) -> str:
    """What the card says, for those who read Chinese."""
    counts, splits, languages = details["counts"], details["splits"], details["languages"]
    return f"""## 中文说明

源数据共 {counts["rows"]} 行:保留 {counts["kept"]} 条记录,拒绝 {counts["rejected"]} 行。
拒绝的原因见上表,逐行见 `rejected.parquet`。
训练集 {splits["train"]} 条,验证集 {splits["val"]} 条,测试集 {splits["test"]} 条。
同一组不会跨越划分:组由 group_id 指定,未指定时首个提示相同的记录为一组。
语言:中文 {languages["zh"]} 条,英文 {languages["en"]} 条,其他 {languages["other"]} 条。
去除提示与答案首尾的空白,略去空的系统消息;此外只有上表中设置为 on 的清洗规则改动文本:
control 去除控制字符与零宽字符,whitespace 统一换行与空格,width 将全角字母、数字、百分号转为半角
(中文标点不变),html 去除标签,script 转换简繁,boilerplate 涉及多条记录共有的首行或末行。
"""


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


def _setting(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
