# ruff: noqa: E501, SIM905
"""The later held-out sets: fresh_en.txt, fresh_zh.txt and fresh_two_zh.txt -> records with planted identifiers, for bench_deidentify.py.

Written after the recognizers were frozen and independent of the first sets: other sentences, names, streets and towns
from mimesis 22.2.0 (25 locales; Icelandic, which no tuning set has, among them) instead of Faker, telephone numbers and
dates in other forms, other noise. `{slot}` is planted and `{~slot}` neutral: neither asked for nor counted against.
Noise: 4 % of the English records in lower case, 2 % in capitals; double and no-break spaces, typographic quotes, a full
stop left out; in Chinese narrow punctuation and spaces around names. It never touches what is planted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from deidentify_corpus import BINS, Planted, digits, iban, id_card, luhn, mac, npi, read_templates, spaced, uscc, vin

Maker = tuple[str, Callable[[], str]]
Made = tuple[list[Planted], list[list[tuple[int, int]]]]
WORLD = "en-gb en-au en-ca de de-at de-ch fr es es-mx it nl nl-be pl pt pt-br sv no da fi cs sk hu hr is et tr".split(
    " "
)
MONTHS = "January February March April May June July August September October November December".split(" ")
# The surnames of nine in ten people in China, each as often as it stands here.
USUAL = "王王王王李李李李张张张张刘刘刘陈陈陈杨杨赵黄黄周吴吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜戴夏钟汪田任姜范方石姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段雷钱汤尹黎易常武乔贺赖龚文"
DOUBLE = "欧阳 上官 司马 诸葛 皇甫 慕容 令狐 夏侯 司徒 东方 尉迟 宇文".split(" ")
FAR = "艾力·吐尔逊 帕提古丽·买买提 巴特尔·苏和 次仁·旺堆 玛依拉·哈斯木 阿布都热合曼·伊明 洛桑·扎西".split(" ")
TOWNS = "浙江省宁波市鄞州区 四川省绵阳市涪城区 福建省泉州市丰泽区 山东省烟台市芝罘区 湖南省株洲市天元区 上海市徐汇区 北京市丰台区 陕西省宝鸡市金台区 广东省佛山市禅城区 辽宁省鞍山市铁东区 河南省洛阳市涧西区 重庆市渝中区".split(
    " "
)
ROADS = "解放路 中山东路 建设大道 滨河街 学府路 光明巷 东风二路 和平里 青年大街 桃园路 新华路 人民南路 香樟大道 凤凰路".split(
    " "
)
ESTATES = "阳光花园 翠湖小区 锦绣家园 书香苑 金色公寓 望江苑 城南新村".split(" ")
# For fresh_two_zh.txt: given names of three generations, written down from memory of real class lists and staff lists.
GIVEN = """建国 建军 国强 志强 志刚 德福 德胜 永贵 长生 宝财 金山 福来 玉兰 桂英 秀珍 淑芬 凤霞 翠花 春梅 素琴 爱华 月娥 美玲 兰芝 玉珍 巧云
海涛 晓东 立新 文革 卫东 红卫 向阳 跃进 新民 保国 铁柱 满仓 根生 水生 来福 小军 小红 晓燕 丽萍 红梅 艳丽 雪梅 海燕 莉莉 晓霞 春燕 慧敏 静怡
俊杰 俊峰 子豪 子涵 子轩 浩然 浩宇 宇航 宇轩 明哲 明轩 博文 博涛 思远 思源 致远 文博 天宇 天佑 嘉豪 嘉懿 煜城 懿轩 鹏涛 炎彬 鹤轩 越泽 风华 靖琪
雨桐 雨欣 梓萱 梓涵 欣怡 可馨 诗涵 诗琪 梦琪 梦瑶 忆柳 之桃 慕青 问兰 尔岚 元香 初夏 沛菡 傲珊 曼文 乐菱 痴珊 恨玉 惜文 香寒 新柔 语蓉 若汐 一诺 一鸣
伟 芳 娜 敏 静 磊 洋 勇 艳 杰 娟 涛 超 霞 刚 平 辉 玲 鹏 华 飞 鑫 波 斌 宇 浩 凯 健 俊 帆 雪 莹 倩 丹 婷 慧 颖 琳 晨 阳 旭 昊 岩 峰 亮 松 龙 梅
启明 守业 传志 继业 学军 学文 大伟 大勇 小虎 二妮 三毛 冬生 秋生 夏雨 春生 晓光 曙光 东升 西林 南燕 北辰 中华 定邦 安邦 治国 齐家 修文 知远 以沫 沐阳""".split()
FIRMS = "恒 瑞 鼎 泰 盛 和 宏 远 嘉 诚 博 联 锦 华 启 明".split(" ")
TRADES = "建材 物流 餐饮管理 生物科技 装饰工程 电子商务 机械制造 教育咨询".split(" ")


def fresh(name: str, count: int, seed: int) -> Made:
    """`count` records of a fresh file, every template equally often, and each one's neutral ranges."""
    english = name.endswith("en.txt")
    rng = random.Random(f"{name}{seed}")
    makers = english_makers(rng) if english else chinese_makers(rng, hand_written="two" in name)
    templates = read_templates(name)
    positives = [t for t in templates if not t.startswith("!")]
    negatives = [t for t in templates if t.startswith("!")]
    made, neutral = [], []
    for i in range(count):
        template = negatives[i // 10 % len(negatives)] if i % 10 == 9 else positives[i % len(positives)]
        record, ranges = _filled(template, makers, rng, english=english)
        made.append(record)
        neutral.append(ranges)
    return made, neutral


def _filled(
    template: str, makers: dict[str, Maker], rng: random.Random, *, english: bool
) -> tuple[Planted, list[tuple[int, int]]]:
    text, spans, neutral = "", [], []
    for part in re.split(r"(\{\{|\}\}|\{~?\w+\})", template.removeprefix("!")):
        if part in ("{{", "}}"):
            text += part[0]
        elif part.startswith("{"):
            kind, maker = makers[part.strip("{~}")]
            value = maker()
            if part.startswith("{~"):
                neutral.append((len(text), len(text) + len(value)))
            else:
                spans.append((len(text), len(text) + len(value), kind))
            text += value
        else:
            text += _noisy(part, rng) if english else _noisy_chinese(part, rng)
    roll = rng.random()
    if english and roll < 0.06:
        changed = text.lower() if roll < 0.04 else text.upper()
        text = changed if len(changed) == len(text) else text
    return Planted(text, tuple(spans), template.startswith("!")), neutral


def _noisy(part: str, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.03:
        return part.replace(" ", "  ", 1)
    if roll < 0.05:
        return part.replace(" ", "\u00a0", 1)
    if roll < 0.08:
        return part.replace("'", "\u2019")
    return part.rstrip(".") if roll < 0.12 else part


def _noisy_chinese(part: str, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.15:
        return part.translate({0xFF0C: ",", 0xFF1A: ":", 0x3002: "."})
    if roll < 0.20:
        return part.translate({ord(","): "\uff0c", ord(":"): "\uff1a"})
    return f"{part} " if roll < 0.23 else part


def english_makers(rng: random.Random) -> dict[str, Maker]:
    """Slot -> (type, maker)."""
    from mimesis import Address, Person
    from mimesis.locales import Locale

    people: dict[str, Any] = {}
    places: dict[str, Any] = {}
    for code in ("en", *WORLD):
        locale = Locale(code)
        people[code] = Person(locale, seed=rng.randrange(2**31))
        places[code] = Address(locale, seed=rng.randrange(2**31))

    def of(sources: dict[str, Any]) -> Any:
        return sources["en" if rng.random() < 0.5 else rng.choice(WORLD)]

    def name() -> str:
        person = of(people)
        first, last = person.first_name(), person.last_name()
        roll = rng.random()
        if roll < 0.08:
            return f"{first} {rng.choice('ABCDEFGHJKLMNPRSTW')}. {last}"
        if roll < 0.12:
            return f"{first} {person.first_name()} {last}"
        return f"{first} {last}-{person.last_name()}" if roll < 0.14 else f"{first} {last}"

    def date() -> str:
        year, month, day = rng.randint(1940, 2024), rng.randint(1, 12), rng.randint(1, 28)
        end = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
        word = MONTHS[month - 1]
        return rng.choice(
            (f"{day}{end} {word} {year}", f"{word} {day}{end}, {year}", f"{day}-{word[:3]}-{year}", f"{day:02d}.{month:02d}.{year}",
             f"{year}/{month:02d}/{day:02d}", f"{day:02d}/{month:02d}/{year}", f"{word[:3]} {day}, {year}")
        )  # fmt: skip

    def phone() -> str:
        a, b, c = rng.randint(201, 989), rng.randint(201, 989), rng.randint(0, 9999)
        return rng.choice(
            (f"({a}) {b}-{c:04d}", f"{a}.{b}.{c:04d}", f"+1 {a} {b} {c:04d}", f"+44 20 7{rng.randint(100, 999)} {c:04d}",
             f"07{rng.randint(100, 999)} {rng.randint(100000, 999999)}", f"+49 30 {rng.randint(1000000, 9999999)}", f"{a}-{b}-{c:04d} ext. {rng.randint(10, 999)}",
             f"+33 6 {rng.randint(10, 99)} {rng.randint(10, 99)} {rng.randint(10, 99)} {rng.randint(10, 99)}")
        )  # fmt: skip

    def address() -> str:
        place = of(places)
        street = place.address()
        roll = rng.random()
        if roll < 0.35:
            return street
        if roll < 0.65:
            return f"{street}, {place.city()}"
        return (
            f"{street}, {place.postal_code()} {place.city()}"
            if roll < 0.85
            else f"{street}, {place.city()}, {place.country()}"
        )

    def email() -> str:
        who = re.sub(r"[^a-z.]", "", f"{people['en'].first_name()}.{people['en'].last_name()}".lower())
        return f"{who}{rng.choice(('', '', str(rng.randint(1, 99))))}@{rng.choice(('mailbox', 'northpost', 'campus', 'firm-mail'))}.{rng.choice(('org', 'net', 'com', 'co.uk', 'de'))}"

    return {
        "name": ("PERSON", name),
        "first": ("PERSON", lambda: of(people).first_name()),
        "last": ("PERSON", lambda: of(people).last_name()),
        "address": ("ADDRESS", address),
        "city": ("", lambda: of(places).city()),
        "org": ("", lambda: f"{people['en'].last_name()} {rng.choice(('Holdings', 'and Partners', 'Logistics Ltd', 'Foundation'))}"),
        "phone": ("PHONE", phone),
        "email": ("EMAIL", email),
        "date": ("DATE", date),
        "card": ("CARD", lambda: spaced(luhn(rng, rng.choice(("4", "52", "55", "2221")), 16), (4, 4, 4), rng.choice((" ", "-", "")))),
        "iban": ("ACCOUNT", lambda: iban(rng)),
        "account": ("ACCOUNT", lambda: digits(rng, rng.choice((8, 10)))),
        "ssn": ("SSN", lambda: f"{rng.randint(101, 665)}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"),
        "passport": ("PASSPORT", lambda: rng.choice(("", "C", "X")) + digits(rng, 8)),
        "license": ("LICENCE", lambda: rng.choice("BDHKMW") + digits(rng, rng.choice((7, 8, 12)))),
        "mbi": ("HEALTH_PLAN", lambda: f"{rng.randint(1, 9)}{rng.choice('ACDEFGH')}{rng.randint(0, 9)}{rng.randint(0, 9)}-{rng.choice('JKMN')}{rng.choice('PQRT')}{rng.randint(0, 9)}-{rng.choice('UVWX')}{rng.choice('YACD')}{rng.randint(10, 99)}"),
        "npi": ("LICENCE", lambda: npi(rng)),
        "mrn": ("MRN", lambda: rng.choice(("", "H-", "P")) + digits(rng, 7)),
        "vin": ("VEHICLE", lambda: vin(rng)),
        "usplate": ("VEHICLE", lambda: f"{''.join(rng.choice('ABCDEFGHJKLM') for _ in range(3))}-{digits(rng, 4)}"),
        "mac": ("DEVICE", lambda: mac(rng)),
        "ip": ("IP", lambda: ".".join(str(rng.randint(2, 250)) for _ in range(4))),
        "url": ("URL", lambda: f"https://www.{rng.choice(('fenwick', 'oldtown', 'bluebarn'))}-{rng.randint(1, 99)}.{rng.choice(('org', 'net', 'info'))}/~{people['en'].last_name().lower()}"),
    }  # fmt: skip


def chinese_makers(rng: random.Random, *, hand_written: bool) -> dict[str, Maker]:
    """Slot -> (type, maker); given names of GIVEN where `hand_written`, else of mimesis."""
    from mimesis import Person
    from mimesis.locales import Locale

    person: Any = Person(Locale.ZH, seed=rng.randrange(2**31))

    def surname() -> str:
        return rng.choice(USUAL) if rng.random() < 0.9 else str(person.surname())

    def name() -> str:
        roll = rng.random()
        if roll < 0.04:
            return rng.choice(FAR)
        return (rng.choice(DOUBLE) if roll < 0.10 else surname()) + (
            rng.choice(GIVEN) if hand_written else str(person.first_name())
        )

    def firm() -> str:
        return f"{rng.choice(TOWNS)[3:5]}{rng.choice(FIRMS)}{rng.choice(FIRMS)}{rng.choice(TRADES)}有限{rng.choice(('', '责任'))}公司"

    def address() -> str:
        where = rng.choice(TOWNS) + rng.choice(ROADS) + f"{rng.randint(1, 399)}号"
        home = rng.choice(
            (
                "",
                f"{rng.randint(1, 20)}栋{rng.randint(1, 4)}单元{rng.randint(101, 2504)}室",
                f"{rng.choice(ESTATES)}{rng.randint(1, 30)}-{rng.randint(101, 2504)}",
            )
        )
        return where + home

    def mobile() -> str:
        return rng.choice(("135", "138", "147", "150", "166", "177", "182", "199")) + digits(rng, 8)

    def date() -> str:
        year, month, day = rng.randint(1949, 2024), rng.randint(1, 12), rng.randint(1, 28)
        return rng.choice(
            (
                f"{year}年{month}月{day}日",
                f"{year}/{month:02d}/{day:02d}",
                f"{year}-{month}-{day}",
                f"{year}.{month}.{day}",
            )
        )

    return {
        "name": ("PERSON", name),
        "surname": ("PERSON", surname),
        "org": ("ORGANIZATION", firm),
        "city": ("", lambda: rng.choice(TOWNS)[3:6]),
        "address": ("ADDRESS", address),
        "mobile": ("PHONE", mobile),
        "mobile_spaced": ("PHONE", lambda: spaced(mobile(), (3, 4), rng.choice("- "))),
        "landline": ("PHONE", lambda: f"{rng.choice(('0574', '0816', '0595', '010', '028'))}{rng.choice('-‐ ')}{rng.choice('2568')}{digits(rng, 7)}"),
        "id": ("ID_CARD", lambda: id_card(rng)),
        "card": ("CARD", lambda: luhn(rng, rng.choice(BINS), rng.choice((16, 19)))),
        "account": ("ACCOUNT", lambda: digits(rng, rng.choice((14, 16, 18)))),
        "uscc": ("COMPANY_ID", lambda: uscc(rng)),
        "plate": ("VEHICLE", lambda: rng.choice("京沪浙川闽鲁湘陕粤") + rng.choice("ABCEFGK") + "".join(rng.choice("ABCDEFGHJKLM0123456789") for _ in range(4)) + rng.choice("0123456789")),
        "vin": ("VEHICLE", lambda: vin(rng)),
        "passport": ("PASSPORT", lambda: rng.choice(("E", "EA", "EJ")) + digits(rng, 8)[: 8 if rng.random() < 0.5 else 7]),
        "hkpermit": ("PERMIT", lambda: rng.choice("HM") + digits(rng, 8)),
        "email": ("EMAIL", lambda: f"{rng.choice(('li', 'wang', 'chen', 'zh', 'sun'))}{digits(rng, 4)}@{rng.choice(('163.com', 'qq.com', 'sina.cn', 'outlook.com'))}"),
        "wechat": ("SOCIAL", lambda: rng.choice(("wxid_", "sky", "xiao_", "Lynn")) + digits(rng, 5)),
        "qq": ("SOCIAL", lambda: rng.choice("123456789") + digits(rng, rng.choice((6, 8, 9)))),
        "ssc": ("SOCIAL_SECURITY", lambda: rng.choice("ABCDEFGH") + digits(rng, 8)),
        "medical": ("HEALTH_PLAN", lambda: digits(rng, rng.choice((9, 11)))),
        "mrn": ("MRN", lambda: rng.choice(("", "B", "MZ")) + digits(rng, rng.choice((6, 9)))),
        "policy": ("HEALTH_PLAN", lambda: rng.choice(("PD", "AL", "")) + digits(rng, 13)),
        "student": ("STUDENT", lambda: f"{rng.randint(2016, 2024)}" + digits(rng, 7)),
        "exam": ("STUDENT", lambda: digits(rng, rng.choice((10, 13)))),
        "employee": ("EMPLOYEE", lambda: rng.choice(("", "N", "HR")) + digits(rng, 5)),
        "mac": ("DEVICE", lambda: mac(rng)),
        "ip": ("IP", lambda: ".".join(str(rng.randint(2, 250)) for _ in range(4))),
        "url": ("URL", lambda: f"http://{rng.choice(('www.', 'blog.'))}{rng.choice(('shufang', 'laojie', 'yuntu'))}{rng.randint(1, 99)}.{rng.choice(('cn', 'com', 'net'))}"),
        "date": ("DATE", date),
    }  # fmt: skip
