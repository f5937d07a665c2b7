"""The manifest's `privacy` -> the data card's section on personal data, in English and Chinese."""

from __future__ import annotations

from typing import Any


def privacy_section(found: dict[str, Any]) -> str:
    """Markdown: what was replaced by what, class by class, and what may be left."""
    if "replaced" not in found:
        suspected = ", ".join(f"{kind} {count}" for kind, count in found["suspected_by_type"].items()) or "none"
        return (
            "## Personal data\n\nNothing was taken out: no policy was set. "
            f"Suspected identifiers in {found['looked_at']} records looked at: {suspected}.\n{_groups(found)}"
        )
    rows = "".join(f"| {kind} | {e['count']} | {e['operator']} |\n" for kind, e in found["replaced"].items())
    classes = "".join(f"| {' | '.join(row)} |\n" for row in class_rows(found, "en"))
    planted = "".join(
        f"| {row['language']} | {row['what']} | {row['planted']} | {row['missed']} | {row['upper_bound']:.2%} |\n"
        for row in found["planted"]
    )
    suspected = ", ".join(f"{kind} {count}" for kind, count in found["suspected"].items()) or "nothing"
    return f"""## Personal data

Policy `{found["policy"]}` ({law_of(found, "en")}): the records are {found["standing"]}.
{found["records_touched"]} records were touched.

| type | replaced | operator |
|---|---:|---|
{rows or "| none | 0 | |" + chr(10)}
*Done*: whatever was found of the class is replaced, by the types named; 0 replaced means that none was found in the
texts that were taken in. What no text shows is not looked for: columns that are left out never enter the data set.

| class | what | status | replaced | by |
|---|---|---|---:|---|
{classes}
What may be left: a second look by other means suspects {suspected} in {found["looked_at"]} records
(`privacy_review.jsonl` has some for a person to read). Identifiers planted in copies of the records:

| language | what | planted | missed | share missed, at most (95 %) |
|---|---|---:|---:|---:|
{planted}
The bounds hold for identifiers like the planted ones. Whoever knows the people may still recognise them.
{_groups(found)}"""


def privacy_section_zh(found: dict[str, Any]) -> str:
    """The same in a few Chinese sentences."""
    if "replaced" not in found:
        count = sum(found["suspected_by_type"].values())
        return f"个人信息:未设策略,未作处理;抽查 {found['looked_at']} 条,疑似个人信息 {count} 处。"
    count = sum(entry["count"] for entry in found["replaced"].values())
    left = sum(found["suspected"].values())
    rows = "".join(f"| {' | '.join(row)} |\n" for row in class_rows(found, "zh"))
    return (
        f"个人信息:按 `{found['policy']}`({law_of(found, 'zh')})替换 {count} 处,涉及 {found['records_touched']} 条记录;"
        f"以另一方法复查 {found['looked_at']} 条,仍疑似 {left} 处,样本见 `privacy_review.jsonl`。\n\n"
        f"| 类别 | 内容 | 状态 | 替换 | 方式 |\n|---|---|---|---:|---|\n{rows}\n"
        "“已处理”指文本中发现的该类信息均已替换;替换为 0 表示所读文本中未发现。未读取的列不进入数据集。\n"
    )


STATUS_ZH = {"done": "已处理", "not done": "未处理", "not applicable": "不适用"}


def law_of(found: dict[str, Any], language: str) -> str:
    """The law in a language, else as the policy has it."""
    return str(found.get("law_in", {}).get(language, found["law"]))


def class_rows(found: dict[str, Any], language: str) -> list[list[str]]:
    """The law's classes as rows: letter, what, status, how many were replaced, by what."""
    rows = []
    for entry in found["classes"]:
        by = entry.get(f"by_{language}", entry["by"])
        if entry.get("kept"):
            kept = ", ".join(entry["kept"])
            by += f"; {kept} stays, as the recipe says" if language == "en" else f";配方保留 {kept}"
        status = entry["status"] if language == "en" else STATUS_ZH.get(entry["status"], entry["status"])
        count = f"{entry['replaced']:,}" if "replaced" in entry else "-"
        rows.append([entry["letter"], entry.get(f"what_{language}", entry["what"]), status, count, by])
    return rows


def _groups(found: dict[str, Any]) -> str:
    if "k_anonymity" not in found:
        return ""
    groups = found["k_anonymity"]
    return (
        f"Rows that share their {', '.join(found['quasi_identifiers'])}: at least {groups['k']}; "
        f"{groups['rows_below_5']} of {groups['rows']} rows share them with fewer than four others.\n"
    )
