"""Chinese addresses and organisations -> spans, found by how they end: 幸福路18号3单元, 同兴万点科技有限公司.

An address begins at a province or city that a list knows, or after a cue (住址, 家住); an organisation runs from its
ending back to the first word that cannot belong to it. 本公司, 商业银行 and 人民法院 are no organisation's own names.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from functools import cache

from metier.data.deidentify.chinese import HAN, NAME_EDGE, Token
from metier.data.deidentify.lexicon import alternatives, cues, words
from metier.data.deidentify.spans import Span

_NUMERAL = "[0-9A-Za-z一二三四五六七八九十百甲乙丙丁东西南北-]"
_TAIL = (
    rf"(?:{_NUMERAL}{{1,6}}(?:号楼|号院|号|栋|幢|座|单元|室|层|楼|弄|巷|组|队|门|户|期|区|排|"
    rf"铺)(?:[0-9]{{1,4}}(?=[^0-9A-Za-z号楼院栋幢座单层室弄巷组队门户期区排铺]|$))?)"
)
_ROAD = rf"[{HAN}]{{1,12}}?(?:大道|大街|路|街|道|巷|弄|胡同|里|村|庄|屯|新村|小区|花园|家园|公寓|大厦|广场|苑|城|座)"


@cache
def _address_pattern(has_number: bool) -> re.Pattern[str]:
    """From a province or city on, or (which takes long to look for) from a road to a house number."""
    region = rf"(?:{alternatives(words('zh_places'))}(?:省|市|自治区|特别行政区|地区|自治州|盟)?)"
    district = rf"(?:[{HAN}]{{1,7}}?(?:自治县|新区|区|县|市|旗|镇|乡|街道|开发区))"
    listed = rf"{region}{{1,3}}{district}{{0,3}}(?:{_ROAD})?[{HAN}]{{0,2}}?{_TAIL}{{0,6}}"
    return re.compile(rf"{listed}|{district}{{0,2}}{_ROAD}{_TAIL}{{1,6}}" if has_number else listed)


_HOUSE_NUMBER = re.compile(_TAIL)
_PLACE = re.compile("[省市区县旗镇乡路街道巷弄村里庄园苑城座号]")
_ADDRESS_CUE = re.compile(
    r"(?:现住址|家庭住址|家庭地址|联系地址|通讯地址|注册地址|收货地址|开户地址|户籍地址|户籍所在地|住所地|住所|住址|地址|现住|家住|住在|居住在|居住于|位于|送到了?|送至|寄到|寄往|"
    r"寄至|搬到|户籍)[::\s为是在\"]{0,4}"
    rf"(?P<v>[{HAN}][{HAN}0-9A-Za-z()-]{{4,60}})"
)


def find_places(text: str) -> Iterator[Span]:
    if not _PLACE.search(text):
        return
    for match in _address_pattern(_HOUSE_NUMBER.search(text) is not None).finditer(text):
        start, end = match.span()
        found = match.group()
        exact = _HOUSE_NUMBER.search(found) is not None
        if exact:
            yield Span(_after_cue(text, start, end), end, "ADDRESS", 0.9)
        elif re.search(_ROAD + "$", found) or len(found) >= 5:
            yield Span(start, end, "LOCATION", 0.6)
    for match in _ADDRESS_CUE.finditer(text):
        value = match["v"]
        tail = list(re.finditer(rf"{_TAIL}|{_ROAD}", value))
        if tail and re.search(r"[省市区县镇乡村路街道巷号室]", value):
            yield Span(match.start("v"), match.start("v") + tail[-1].end(), "ADDRESS", 0.92)


_ADDRESS_AFTER = "地址|住址|住所|家住|住在|现住|住|位于|送到了?|送至|寄到|搬到|前往|来自|在|于|到|至|是|为|了|的"


def _after_cue(text: str, start: int, end: int) -> int:
    """Where the address begins: after the last cue, verb or preposition that the pattern ran over."""
    found = list(re.finditer(_ADDRESS_AFTER, text[start : end - 4]))
    return start + found[-1].end() if found else start


_ORG_END = re.compile(
    "(?:(?:股份)?有限(?:责任)?公司|股份公司|公司)|集团|银行(?!业)(?:[\u4e00-\u9fff]{2,8}?(?:分行|支行|营业部))?|支行|分行|信用社|医院|卫生院|诊所|门诊部|"
    "(?:大学|学院|中学|小学)(?!生)|幼儿园|学校|研究所|研究院|事务所|"
    "基金会|协会|商会|合作社|派出所|公安局|法院|检察院|税务局|居委会|村委会|律所|工作室|经营部|商行|药房|超市|酒店|餐厅"
)


def find_organisations(text: str, tagged: list[Token]) -> Iterator[Span]:
    """A run of nouns that ends like an organisation; 本公司 and 商业银行 are none."""
    outside = cues("zh_organisation_before")
    starts: list[int] = []
    position = 0
    for word, _ in tagged:
        starts.append(position)
        position += len(word)
    for match in _ORG_END.finditer(text):
        index = max(0, bisect.bisect_right(starts, match.start()) - 1)
        if starts[index] == match.start():
            index -= 1
        begin = match.start()
        while index >= 0 and match.end() - starts[index] <= 24:
            word = tagged[index][0]
            earlier = tagged[index - 1][0] if index else ","
            edge = NAME_EDGE.match(earlier[-1]) or earlier in outside
            if not re.match(f"[{HAN}A-Za-z0-9()]", word) or (word in outside and not (word in "和同与" and edge)):
                break
            begin = starts[index]
            index -= 1
        cut = [(m.end(), m.group()) for m in _ORG_CUT.finditer(text[begin : match.start()])]
        begin += cut[-1][0] if cut else 0
        inside = slice(bisect.bisect_left(starts, begin), bisect.bisect_left(starts, match.start()))
        own = [tag for _, tag in tagged[inside]]
        if match.start() - begin >= 2 and _has_own_name(text[begin : match.start()], own, match.group()):
            yield Span(begin, match.end(), "ORGANIZATION", 0.7)


_ORG_CUT = re.compile(
    "的|向|购买|利用|进入|开设|给予|参照|行使|损害|何为|其他|同级|上级|下级|上一级|不得|或者|负责|条件|以下|以上|以外|通知|[0-9]日内|之日|通过|取得"
)


def _has_own_name(name: str, tags: list[str], ending: str) -> bool:
    """Whether the words before the ending name one organisation; 农民专业合作社 and 海事法院 do not."""
    if name in cues("zh_organisation_common"):
        return False
    if "有限" in ending or "股份" in ending:
        return not _is_generic(name)
    if ending in ("法院", "检察院", "派出所", "公安局", "税务局", "居委会", "村委会"):
        return re.search("[市县区镇乡]", name) is not None or name.startswith(words("zh_places"))
    own = sum(tag in ("ns", "nz", "nt", "x", "eng", "j", "m") or tag.startswith("nr") for tag in tags)
    return own > 0 and not _is_generic(name)


def _is_generic(name: str) -> bool:
    """Whether the words before the ending say only what kind of organisation it is."""
    import rjieba

    return all(word in cues("zh_organisation_common") for word in rjieba.cut(name))
