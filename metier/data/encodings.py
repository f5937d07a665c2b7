"""The first bytes of a file -> its encoding, or a sentence that asks for it: a wrong text is never taken in silence.

A byte-order mark decides. Otherwise every candidate decodes the bytes, and the text that is likelier as Chinese or
Western writing wins: each character has a log-probability by its rank among common characters (written by hand, both
scripts) or by its class, an undecodable byte costs 30 nats, and well-formed multi-byte UTF-8 earns 2 a character,
because it hardly comes about by accident. The candidates are comparable since all of them explain the same bytes.
Where the second-best text is nearly as likely, or the best is unlikely as such, `DataError` asks for `data.encoding`.

Limits: UTF-8, UTF-16, GB18030 (with GBK and GB2312 in it), Big5 and cp1252. A file in another encoding is refused by
its improbable text, or can be named in the recipe.
"""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from metier.errors import DataError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Nats between the best text and the next one, and the least a character above ASCII may have on average.
MARGIN = 3.0
PLAUSIBLE = -9.4
PLAUSIBLE_SHORT = -11.0  # of fewer than 12 characters
UTF8_PER_CHARACTER = 2.0
UNDECODABLE = -30.0
LEAST_CHARACTERS = 3
LEAST_WESTERN = 20  # letters in different words
CHINESE = ("gb18030", "cp950", "big5hkscs")

# By falling frequency in general text, with the words of tables and of the three domains behind them.
_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好"
    "小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果"
    "加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必"
    "场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确"
    "传师观清今切院让识候带导争运笔答案标签编号姓患病诊断症状疗医药检查容银账户贷款率股票风险投收益价课考试绩班级语言输令复请客服询单订退货付费甲乙双律判证申登构企址码份邮"
    "箱备注负积极消红黄蓝绿早晚吃饭车站飞京广深圳香港台湾省县镇村街爱喜欢快乐兴苦热冷春夏秋冬父母亲兄弟姐妹朋友孩男狗猫花草树木林河湖江雨雪云星火土石音歌影视画图片字词句段"
    "章页纸刊杂志网络软硬序算器智慧模型训练测验评估集例错误修改删除增添减找搜索排列顺组织团董副裁助秘职士兵警察防护族宗富裕贫困农城环境污染源煤炭油核阳"
)
_SIMPLIFIED = (
    "这个们来为国说时会对于过发后里种经么学现当没动还进样开从实军无与长机关点业将两间问并应战头体见产话内给门儿东声员论处义几认条气题尔别变总电数报结务场计资许统区队决马书则听"
    "却达强难权设记类据边张该规万觉术领确传师观让识带导争运笔标签编号诊断状疗医药检银账户贷风险价课试绩级语输复请询单订货费双证构码邮备负积极红黄蓝绿饭车飞广台湾县镇爱欢乐兴"
    "热亲猫树云视画图词页纸杂网络软训练测验评错误删减顺组织团秘职护贫农环阳"
)
_TRADITIONAL = (
    "這個們來為國說時會對於過發後裏種經麼學現當沒動還進樣開從實軍無與長機關點業將兩間問並應戰頭體見產話內給門兒東聲員論處義幾認條氣題爾別變總電數報結務場計資許統區隊決馬書則聽"
    "卻達強難權設記類據邊張該規萬覺術領確傳師觀讓識帶導爭運筆標籤編號診斷狀療醫藥檢銀賬戶貸風險價課試績級語輸復請詢單訂貨費雙證構碼郵備負積極紅黃藍綠飯車飛廣臺灣縣鎮愛歡樂興"
    "熱親貓樹雲視畫圖詞頁紙雜網絡軟訓練測驗評錯誤刪減順組織團秘職護貧農環陽"
)
# The accented letters of one language each: a Western text has those of one, with few strangers.
_WESTERN = tuple(
    set(letters + letters.upper().replace("SS", ""))
    for letters in (
        "àâæçéèêëîïôœùûüÿ", "äöüßé", "áéíóúüñªº", "àèéìíîòóùú", "áâãàçéêíóôõúüªº", "éëïóöüèêá", "æøåéöä", "áéíóúýþæöð"
    )
)  # fmt: skip
_OF_CLASS = {
    **dict.fromkeys("\n\r\t", -4.0),
    **dict.fromkeys("àâäáãåçèéêëíîïñóôöõúùûüß", -6.5),
    **dict.fromkeys("\uff0c。、\uff1a", -4.5),
    **dict.fromkeys("“”《》\uff08\uff09\uff1f\uff01\uff1b【】「」\u3000·—…", -6.5),
    **dict.fromkeys("‘’–€•™«»°£§®©½²³µ±×¿¡ºª", -8.0),
    **dict.fromkeys("①②③④⑤℃※→←↑↓■□●○△▲★☆\uff05\uff0b\uff0d\uff0f\uff1d\uff1c\uff1e々〇", -9.0),
    "\ufeff": -8.0,
    "\0": -30.0,
    "\ufffd": -30.0,
}
_ALPHABETS = ("GREEK", "CYRILLIC", "ARABIC", "HEBREW", "THAI", "HANGUL", "HIRAGANA", "KATAKANA", "DEVANAGARI")
_HAN_BESIDE_LATIN = re.compile(r"(?<=[A-Za-z])[\u3400-\u9fff]|[\u3400-\u9fff](?=[A-Za-z])")
_UNDECODABLE = re.compile(r"[\udc80-\udcff]")
_ABOVE_ASCII = re.compile(r"[^\x00-\x7f]")


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a file is written in. `codec` is Python's name, `how` says why it was taken."""

    codec: str
    how: str  # named, mark, ascii or likely
    mark: int = 0  # bytes of the byte-order mark

    @property
    def label(self) -> str:
        """For people: `UTF-8`, `GB18030`, with how it was found."""
        name = {"cp950": "Big5", "big5hkscs": "Big5-HKSCS", "cp1252": "cp1252"}.get(self.codec, self.codec.upper())
        how = {"named": "named in the recipe", "mark": "byte-order mark", "ascii": "ASCII only", "likely": "detected"}
        return f"{name} ({how[self.how]})"


def named_encoding(name: str, head: bytes) -> Encoding:
    """The encoding that the recipe names. Raises `DataError` for a name that Python does not know."""
    try:
        info = codecs.lookup({"gbk": "gb18030", "gb2312": "gb18030", "big5": "cp950"}.get(name.lower(), name))
        "a".encode(info.name)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"`data.encoding`: there is no encoding `{name}`",
            hint="such as utf-8, utf-16, gb18030, gbk, big5, cp1252, shift_jis",
        ) from None
    marked = next(((mark, codec) for mark, codec in MARKS if head.startswith(mark)), None)
    if marked and (marked[1] == info.name or info.name in ("utf-16", "utf-8-sig")):
        return Encoding(marked[1], "named", len(marked[0]))
    plain = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
    return Encoding(plain.get(info.name, info.name), "named")


def detect_encoding(head: bytes, sample: bytes, path: Path) -> Encoding:
    """The encoding of a file by its first bytes and by `sample`, those of its lines that hold more than ASCII.

    Raises `DataError` where the bytes are likely in several encodings, or in none of the known ones.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) and head[4:]:
        raise DataError(f"`{path}` is UTF-32", hint="convert it, or set `data.encoding: utf-32`")
    for mark, codec in MARKS:
        if head.startswith(mark):
            return Encoding(codec, "mark", len(mark))
    if not sample and b"\0" not in head:
        return Encoding("utf-8", "ascii")
    texts = {"utf-8": _decode(sample, "utf-8"), "gb18030": _decode(sample, "gb18030")}
    texts["cp950"] = _decode(sample, "cp950")
    if _UNDECODABLE.search(texts["cp950"]):
        texts["big5hkscs"] = _decode(sample, "big5hkscs")
    texts["cp1252"] = _decode(sample, "cp1252")
    scores = {codec: _score(text, codec) for codec, text in texts.items()}
    if len(head) % 2 == 0 or len(head) >= 4096:
        even = head[: len(head) // 2 * 2]
        for codec in ("utf-16-le", "utf-16-be"):
            texts[codec] = even.decode(codec, "replace")
            # Over the head, not over the sample: compared by what the other encodings make of the head.
            scores[codec] = _score(texts[codec], codec)
        if sample != head:
            at_head = max(_score(_decode(head, codec), codec) for codec in texts if not codec.startswith("utf-16"))
            others = max(score for codec, score in scores.items() if not codec.startswith("utf-16"))
            for codec in ("utf-16-le", "utf-16-be"):
                scores[codec] += others - at_head
    return _choose(scores, texts, path)


def _choose(scores: dict[str, float], texts: dict[str, str], path: Path) -> Encoding:
    ranked = sorted(scores, key=lambda codec: -scores[codec])
    best = ranked[0]
    rival = next((codec for codec in ranked[1:] if texts[codec] != texts[best]), None)
    if not _is_plausible(texts[best], best):
        raise DataError(
            f"`{path}`: its encoding is none of UTF-8, UTF-16, GB18030, Big5 and cp1252, or it is no text",
            hint="name it in the recipe, such as `data: {encoding: shift_jis}`, or export the file as UTF-8",
        )
    if rival is None or scores[best] - scores[rival] >= MARGIN:
        rival = _unrefuted(best, texts)
    if rival:
        names = [Encoding(codec, "likely").label.split(" ")[0] for codec in (best, rival)]
        raise DataError(
            f"`{path}` may be {names[0]} or {names[1]}: it is too short to tell",
            hint=f"name it in the recipe, such as `data: {{encoding: {best}}}`, or export the file as UTF-8",
        )
    return Encoding(best, "likely")


def _unrefuted(best: str, texts: dict[str, str]) -> str | None:
    """A Chinese reading of one or two characters above ASCII, however often they stand there, or None.

    In Chinese they tell nothing. A letter of the West tells something where the words beside it are some.
    """
    found = set(_ABOVE_ASCII.findall(texts[best]))
    words = "".join(set(re.findall("[a-z]+", texts[best].lower())))
    # Three bytes or four that fit together by accident are rare.
    is_known = all(_log_probability(c) >= -9.0 or (best == "utf-8" and ord(c) > 0x7FF) for c in found)
    says_much = is_known and (best == "utf-8" or (best == "cp1252" and len(words) >= LEAST_WESTERN))
    if len(found) >= LEAST_CHARACTERS or says_much:
        return None
    whole = [codec for codec in CHINESE if codec in texts and not _UNDECODABLE.search(texts[codec])]
    return next((codec for codec in whole if texts[codec] != texts[best]), None)


def _decode(raw: bytes, codec: str) -> str:
    """Undecodable bytes become lone surrogates; a character that the end cuts is left out."""
    return codecs.getincrementaldecoder(codec)("surrogateescape").decode(raw)


def _score(text: str, codec: str) -> float:
    """Log-probability of the text, in nats, with what UTF-8's form says for itself."""
    score = math.fsum(count * _log_probability(character) for character, count in Counter(text).items())
    score -= 1.5 * len(_HAN_BESIDE_LATIN.findall(text)) + (2.0 if codec == "big5hkscs" else 0.0)
    if codec == "utf-8":
        score += UTF8_PER_CHARACTER * (len(_ABOVE_ASCII.findall(text)) - len(_UNDECODABLE.findall(text))) + 1.0
    return score


@cache
def _log_probability(character: str) -> float:
    code = ord(character)
    ranks = _ranks()
    if character in ranks:
        return -2.5 - math.log(ranks[character] + 12)
    if character in _OF_CLASS:
        return _OF_CLASS[character]
    if code < 0x80:
        return -25.0 if code < 0x20 or code == 0x7F else _ascii(character)
    if 0xDC80 <= code <= 0xDCFF:
        return UNDECODABLE
    if 0x4E00 <= code <= 0x9FFF:
        return _rare_han(character)
    kind = unicodedata.category(character)
    if kind in ("Cn", "Co", "Cs", "Cc"):
        return -28.0
    if 0xC0 <= code <= 0x24F:
        return -9.0
    if 0xFF10 <= code <= 0xFF5A:
        return -8.5
    if unicodedata.name(character, "").startswith(_ALPHABETS):
        return -9.5
    return -16.0 if kind == "Lo" else -13.0


def _ascii(character: str) -> float:
    if character == " ":
        return -2.5
    return -3.5 if character.islower() else -4.5


def _rare_han(character: str) -> float:
    """The first levels of GB2312 and Big5 hold the common characters, the second ones the rest."""
    try:
        if character.encode("gb2312")[0] < 0xD8:
            return -10.0
        level = -12.5
    except UnicodeEncodeError:
        level = -16.0
    try:
        return max(level, -10.5 if character.encode("big5")[0] < 0xC9 else -14.0)
    except UnicodeEncodeError:
        return level


@cache
def _ranks() -> dict[str, int]:
    ranks = {character: rank for rank, character in enumerate(_HAN)}
    for simplified, traditional in zip(_SIMPLIFIED, _TRADITIONAL, strict=True):
        ranks.setdefault(traditional, ranks[simplified])
    return ranks


def _is_plausible(text: str, codec: str) -> bool:
    characters = Counter(_ABOVE_ASCII.findall(text))
    total = sum(characters.values())
    sizes = {c: len(c.encode(errors="replace")) for c in characters}
    if codec == "utf-8" and (sum(n * sizes[c] for c, n in characters.items()) >= 6 or 4 in sizes.values()):
        # Any script may be written in Unicode; what must not be there is a wealth of unassigned characters.
        wrong = sum(n for c, n in characters.items() if _log_probability(c) <= -28.0)
        return wrong < 0.3 * total
    least = PLAUSIBLE if total >= 12 else PLAUSIBLE_SHORT
    if total and math.fsum(n * _log_probability(c) for c, n in characters.items()) / total < least:
        return False
    return codec != "cp1252" or _is_western(text, characters)


def _is_western(text: str, characters: Counter[str]) -> bool:
    letters = {c: n for c, n in characters.items() if c.isalpha() and c not in "µªº"}
    total = sum(letters.values())
    if not total:
        return True
    covered = max(sum(n for c, n in letters.items() if c in language) for language in _WESTERN)
    plain = sum(1 for c in text if c.isascii() and c.isalpha())
    return covered >= 0.8 * total and total <= 0.6 * max(plain, 1) + 2


def sample_lines(chunks: Iterable[bytes], enough: int) -> bytes:
    """The lines among `chunks` that hold more than ASCII, until there are `enough` bytes of them."""
    sample = bytearray()
    rest = b""
    for chunk in chunks:
        block = rest + chunk
        cut = block.rfind(b"\n") + 1 or len(block)
        rest = block[cut:]
        if not block.isascii():
            sample += b"".join(line for line in block[:cut].splitlines(keepends=True) if not line.isascii())
        if len(sample) >= enough:
            return bytes(sample[:enough])
    return bytes(sample) + (b"" if rest.isascii() else rest)
