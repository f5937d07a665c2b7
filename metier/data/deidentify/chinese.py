"""Chinese names, organisations and addresses -> spans.

A name is a surname with one or two characters after it. Each candidate gets points: for its surname, for characters
that given names use, for what stands left and right of it, and for where a dictionary (jieba's, by rjieba) would cut the text; a
dictionary word such as 白细胞 or 王朝 costs points. Names with a middle dot, surnames before a title (张女士), addresses and
organisations are found by their ends. Limits: a rare surname without any cue is missed, and a name of a famous person
is a name like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources

import yaml

from metier.data.deidentify.lexicon import characters, word_set, words
from metier.data.deidentify.spans import Span

Token = tuple[str, str]  # a word and its part of speech
WordAt = tuple[int, str, str]  # where a word starts, the word, its part of speech

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
MIN_POINTS = -0.8

# What stands right before a name: roles, relations, verbs, prepositions.
_BEFORE = (
    "姓名 名字 患者 病人 病员 病患 客户 用户 会员 学生 同学 考生 新生 学员 家长 家属 老师 教师 导师 班主任 校长 院长 医生 医师 大夫 护士 主任 护士长 药师 麻醉师 "
    "经理 客户经理 总监 董事长 总经理 行长 主管 会计 出纳 法定代表人 法人 法人代表 代表人 负责人 联系人 经办人 复核人 审批人 申请人 投保人 被保险人 受益人 借款人 担保人 "
    "保证人 委托人 受托人 代理人 监护人 收件人 收货人 寄件人 发件人 持卡人 持证人 户名 户主 车主 机主 业主 房东 租客 司机 驾驶员 乘客 旅客 员工 职工 同事 队友 领导 "
    "原告 被告 被告人 上诉人 被上诉人 第三人 证人 见证人 律师 法官 审判长 审判员 书记员 嫌疑人 犯罪嫌疑人 受害人 被害人 当事人 死者 伤者 投诉人 客服 操作员 作者 通讯作者 "
    "第一作者 主编 编辑 记者 主持人 主讲人 演讲人 监考员 违纪考生 监考教师 甲方 乙方 丙方 父亲 母亲 爸爸 妈妈 丈夫 妻子 老公 老婆 儿子 女儿 哥哥 弟弟 姐姐 妹妹 爷爷 奶奶 外公 "
    "外婆 叔叔 阿姨 舅舅 姑姑 孩子 患儿 男孩 女孩 朋友 同桌 邻居 室友 本人 我是 我叫 叫做 名叫 叫 姓名是 名字是 名字叫 签名 签字 签名人 称呼 此致 落款 "
    "上级 直属上级 下属 组长 队长 班长 主刀 助手 主治医师 主治医生 主诊医师 责任护士 接诊医生 报告医师 审核医师 检查者 记录者 陪同 抄送 先生 女士 请 "
    "参会人员 与会人员 出席 请假 值班 成员 研究生 博士生 姓名为 昵称 送达人 申报人 填表人 制表人 制单人 审核人 批准人 验收人 采购员 业务员 销售 推荐人 介绍人 紧急联系人 收款人 付款人 "
    "甲 乙 男友 女友 前妻 前夫 岳父 岳母 婆婆 公公 孙子 孙女 侄子 表哥 堂弟 师傅 教练 村民 居民 市民 网友 店主 老板 老板娘 秘书 助理 顾问 专家 学者 教授 副教授 讲师 辅导员 院士"
).split()
# Words after which a name often stands, that stand before much else too.
_BEFORE_WEAK = "和 与 跟 同 及 由 向 给 对 被 把 将 让 请 找 为 是 据 经 带 问 替 陪 以及 还有 感谢 谢谢 转告 通知 告知 联系 询问 冒充 认识 委托 诉 称 姓 的 以 受 于 而 但 因 帮 叫 等 从 代".split()
# What stands right after a name.
_AFTER = (
    "先生 女士 小姐 太太 老师 同学 医生 医师 大夫 护士 主任 教授 副教授 博士 院长 校长 经理 总监 总裁 总经理 董事长 行长 主管 律师 法官 警官 同志 师傅 阿姨 叔叔 奶奶 爷爷 "
    "书记 主席 部长 局长 处长 科长 组长 队长 班长 副主任 主治医师 医师行 护士长 家长 家属 本人 患者 等人 夫妇 一家 客户 员工"
).split()
_AFTER_WEAK = (
    "说 称 表示 反映 介绍 告诉 认为 指出 问 答 的 与 和 及 因 于 在 向 从 到 把 被 将 已 患 入院 出院 诉 系 是 为 负责 协助 今年 昨天 今天 明天 近期 最近 收 发 去 来 有 "
    "做 办理 申请 签订 担任 驾驶 需要 指导 起诉 借款 未 不 没 也 都 就 这 那 你 您 我 他 她 要 想 会 能 可 请 一起 从小 刚 又 再 还 目前 现 曾 正 必须 应 欠 打 写 提 带 拿 送 交 至 陪 略 病 既往 主诉 自 经 共 "
    "住 家 年 男 女 生 身 手 电 联系 签 审 完 提出 名下 一 两 上 下 先 很"
).split()
_TITLES = (
    "先生 女士 小姐 太太 老师 医生 医师 大夫 护士 主任 教授 博士 院长 校长 经理 总监 总裁 总经理 董事长 行长 律师 法官 警官 同志 师傅 阿姨 叔叔 书记 局长 处长 科长 总 工 同学"
).split()
# Surnames that make other words with a title: 高工, 马路, 老师.
_NOT_BEFORE_TITLE = set("老 大 小 女 男 好 本 该 各 某 那 这 师 牙 军 法 中 西 兽 班 副 正 前 任 现 都 时 和 于 向 由 但 每 全 单 应 常 成 相 来 官 区 门 国 家 公 职 员 分 施 复 员 初 高".split())

NAME_EDGE = re.compile(r"[\s,.;:!?、。;:,()()\[\]<>《》“”\"'|/=·\-—…@#0-9A-Za-z]")


@cache
def _surnames() -> frozenset[str]:
    return frozenset(words("zh_surnames"))


@cache
def _rare() -> frozenset[str]:
    """Surnames that are everyday words too."""
    return frozenset(words("zh_rare_surnames"))


@cache
def _compound() -> frozenset[str]:
    return frozenset(words("zh_compound_surnames"))


@cache
def _given() -> frozenset[str]:
    return characters("zh_given")


@cache
def _terms() -> re.Pattern[str]:
    long = sorted((word for word in words("zh_terms") if len(word) > 2), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, long)))


@cache
def _sides() -> tuple[dict[str, float], dict[str, float]]:
    before = dict.fromkeys(_BEFORE_WEAK, 1.5) | dict.fromkeys(_BEFORE, 3.5)
    return before, dict.fromkeys(_AFTER_WEAK, 1.5) | dict.fromkeys(_AFTER, 3.5)


@cache
def _weights() -> dict[str, float]:
    text = resources.files(__package__).joinpath("zh_name_weights.yaml").read_text(encoding="utf-8")
    weights: dict[str, float] = yaml.safe_load(text)
    return weights


def find_chinese_names(text: str) -> tuple[list[Span], list[tuple[int, int]], list[Token]]:
    """Spans of folded `text`; the ranges of domain terms, in which nothing is a name; the text cut into words."""
    import rjieba

    tagged: list[Token] = rjieba.tag(text)
    protected = [match.span() for match in _terms().finditer(text)]
    return [*_dotted(text), *_names(text, tagged, protected)], protected, tagged


def _names(text: str, tagged: list[Token], protected: list[tuple[int, int]]) -> Iterator[Span]:
    word_at, starts = _cuts(tagged)
    blocked = {i for start, end in protected for i in range(start, end)}
    surnames, compound = _surnames(), _compound()
    position = 0
    while position < len(text) - 1:
        char = text[position]
        size = 2 if text[position : position + 2] in compound else 1 if char in surnames else 0
        if not size or position in blocked:
            position += 1
            continue
        best = max(
            (_points(text, position, size, given, word_at, starts), given)
            for given in (0, 1, 2)
            if position + size + given <= len(text)
        )
        points, given = best
        end = position + size + given
        if points >= MIN_POINTS and not blocked.intersection(range(position, end)):
            yield Span(position, end, "PERSON", min(0.55 + points / 20, 0.94))
            position = end
        else:
            position += 1


def _cuts(tagged: list[Token]) -> tuple[list[WordAt], set[int]]:
    """For each character the start, text and part of speech of its word; and all starts."""
    word_at: list[WordAt] = []
    starts = set()
    for word, tag in tagged:
        start = len(word_at)
        starts.add(start)
        word_at += [(start, word, tag)] * len(word)
    starts.add(len(word_at))
    return word_at, starts


def _points(
    text: str, start: int, size: int, given: int, word_at: list[WordAt], starts: set[int]
) -> float:
    """How much speaks for the name of `size` surname and `given` further characters at `start`: log odds."""
    if given == 0:
        return _title_points(text, start, size, word_at)
    rest = text[start + size : start + size + given]
    if not all("\u4e00" <= char <= "\u9fff" for char in rest) or any(
        rest.startswith(title) for title in _TITLES if len(title) > 1
    ):
        return -9.0
    weights = _weights()
    return sum(weights.get(mark, 0.0) for mark in _marks(text, start, size, given, word_at, starts))


def _marks(
    text: str, start: int, size: int, given: int, word_at: list[WordAt], starts: set[int]
) -> list[str]:
    """What is seen of a candidate; each mark has its weight."""
    end = start + size + given
    surname = "double" if size == 2 else "word" if text[start] in _rare() else "single"
    known = sum(char in _given() for char in text[start + size : end])
    marks = ["bias", f"surname {surname}", f"given {known} of {given}", f"left {_left(text, start, word_at)}"]
    marks.append(f"right {_right(text, end, word_at)}")
    if text[start:end] in word_set("zh_words"):
        marks.append("is a word")
    if size == 1 and text[start : start + 2] in word_set("zh_terms"):
        marks.append("begins with a term")
    return marks + _cut_marks(start, end, size, word_at, starts)


def _cut_marks(start: int, end: int, size: int, word_at: list[WordAt], starts: set[int]) -> list[str]:
    """Where the dictionary cuts the text around the name, and what it sees in it."""
    first_start, first, tag = word_at[start]
    last_start, last, last_tag = word_at[end - 1]
    kind = "name" if tag.startswith("nr") else "other" if tag in ("x", "eng") else "word"
    if first_start == start and len(first) == end - start:
        return [f"cut exact {kind}"]
    marks = []
    if first_start < start:
        marks.append("cut before " + ("name" if tag.startswith("nr") else "word"))
    elif len(first) == 2 and size == 1:
        marks.append(f"cut head {kind}")
    elif len(first) > end - start:
        return [f"cut over {kind}"]
    if last_start + len(last) > end:
        marks.append("cut after " + ("name" if last_tag.startswith("nr") else "word"))
    elif last_start == start + size and len(last) == 2:
        marks.append("cut rest " + ("name" if last_tag.startswith("nr") else "word"))
    if start in starts and end in starts:
        marks.append("cut fits")
    return marks


def _title_points(text: str, start: int, size: int, word_at: list[WordAt]) -> float:
    """A surname alone counts only right before a title: 张女士, 欧阳医生."""
    surname = text[start : start + size]
    title = next((t for t in _TITLES if text.startswith(t, start + size)), None)
    if title is None or surname in _NOT_BEFORE_TITLE:
        return -9.0
    word_start, word, _ = word_at[start]
    if word_start < start or (len(word) > size and not word[size:] == title[: len(word) - size]):
        return -9.0
    left = _left(text, start, word_at)
    if len(title) == 1 and _right(text, start + size + 1, word_at) == "none" and left in ("none", "noun"):
        return -9.0
    return 4.0 if surname not in _rare() or left in ("cue", "edge") else MIN_POINTS - 1


def _left(text: str, start: int, word_at: list[WordAt]) -> str:
    """What stands before: a cue, an edge, a weak cue, a word of a kind that names follow, or anything."""
    before = _sides()[0]
    if start == 0:
        return "edge"
    if NAME_EDGE.match(text[start - 1]):
        cue = text[max(0, start - 8) : start].rstrip(" ::,\t\"'、是为")
        return "cue" if any(before.get(cue[-n:], 0) > 3 for n in range(2, 7)) else "edge"
    listed = max((before.get(text[start - n : start], 0.0) for n in range(1, 6) if start >= n), default=0.0)
    word_start, word, tag = word_at[start - 1]
    if listed:
        return "cue" if listed > 3 else "weak"
    if word_start + len(word) > start:
        return "none"
    return "verb" if tag[0] in "vpctdfyru" else "noun" if tag[0] == "n" else "none"


def _right(text: str, end: int, word_at: list[WordAt]) -> str:
    """The same for what stands after."""
    if end == len(text) or NAME_EDGE.match(text[end]):
        return "edge"
    after = _sides()[1]
    listed = max((after.get(text[end : end + n], 0.0) for n in range(1, 5)), default=0.0)
    word_start, _, tag = word_at[end]
    if listed:
        return "cue" if listed > 3 else "weak" if word_start == end else "inside"
    return "none" if word_start < end else "verb" if tag[0] in "vpctdfyru" else "noun" if tag[0] == "n" else "none"


def _dotted(text: str) -> Iterator[Span]:
    """买买提·阿不都拉: parts joined by a middle dot, as far as their characters write foreign sounds."""
    if "·" not in text:
        return
    sounds = characters("zh_transliteration")
    for match in re.finditer(rf"(?<=[{HAN}])·(?=[{HAN}])", text):
        start, end = match.start(), match.end()
        while start > 0 and text[start - 1] in sounds and match.start() - start < 8:
            start -= 1
        while end < len(text) and text[end] in sounds and end - match.end() < 8:
            end += 1
        if match.start() - start >= 2 and end - match.end() >= 2:
            yield Span(start, end, "PERSON", 0.9)
