# ruff: noqa: E501
"""Sentence templates -> records with planted identifiers, for benchmarks/bench_deidentify.py.

Names, addresses and companies come from Faker (zh_CN, en_US), so that no list of the recognizers is their source; the
numbers are made here with valid check digits. 8 % of the Chinese names have a compound surname, 6 % a middle dot.
A planted span is (start, end, type). Lines that begin with `!` are hard negatives: nothing in them may be touched.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "deidentify"
COMPOUND = [
    "欧阳",
    "司马",
    "上官",
    "诸葛",
    "东方",
    "皇甫",
    "尉迟",
    "公孙",
    "慕容",
    "令狐",
    "夏侯",
    "司徒",
    "端木",
    "南宫",
    "独孤",
    "宇文",
    "长孙",
    "百里",
]
MINORITY = [
    "买买提·阿不都拉",
    "古丽娜尔·艾合买提",
    "阿依古丽·买买提",
    "迪丽努尔·托合提",
    "扎西·顿珠",
    "努尔兰·哈力克",
    "热合曼·吐尔逊",
]
BINS = ["622202", "622848", "621700", "623058", "621661", "621483", "622588", "436742", "621226", "622262"]
PROVINCES = "京津冀晋蒙辽吉黑沪苏浙皖闽赣鲁豫鄂湘粤桂琼渝川贵云藏陕甘青宁新"
ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
USCC_ALPHABET = "0123456789ABCDEFGHJKLMNPQRTUWXY"
USCC_WEIGHTS = (1, 3, 9, 27, 19, 26, 16, 17, 20, 29, 25, 13, 8, 24, 10, 30, 28)
MBI_LETTERS = "ACDEFGHJKMNPQRTUVWXY"
# First and last names that are words too, for the tuning sets.
WORD_FIRST = "April May June August Rose Hope Grace Faith Joy Dawn Autumn Summer Jade Ruby Mark Will Bill Rich Frank Guy Grant Chase Drew Holly Ivy Daisy Amber Crystal Art Skip Jack Iris Pearl Melody"
WORD_LAST = (
    "Wood Price Hill Baker Young Long Rice Stone Fields Banks Cook Bush Page Frost Snow Reed Field Shepherd Cross Day"
)

# Types whose form alone (or a cue beside it) gives them away; the rest are names, organisations and addresses.
UNSTRUCTURED = {"PERSON", "ORGANIZATION", "ADDRESS", "LOCATION"}


@dataclass(frozen=True)
class Planted:
    """A record: its text, what was planted in it, and whether it is a hard negative."""

    text: str
    spans: tuple[tuple[int, int, str], ...]
    negative: bool = False


def read_templates(name: str) -> list[str]:
    """The templates of a file, one a line; a name or address alone may span lines written as \\t or \\n."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [line.replace("\\t", "\t").replace("\\n", "\n") for line in lines if line and not line.startswith("#")]


def fill(template: str, makers: dict[str, tuple[str, Callable[[], str]]]) -> Planted:
    """One record: each {slot} gets a value, `{{` and `}}` are braces."""
    negative = template.startswith("!")
    text, spans = "", []
    for part in re.split(r"(\{\{|\}\}|\{\w+\})", template.removeprefix("!")):
        if part in ("{{", "}}"):
            text += part[0]
        elif part.startswith("{"):
            kind, maker = makers[part[1:-1]]
            value = maker()
            if kind:
                spans.append((len(text), len(text) + len(value), kind))
            text += value
        else:
            text += part
    return Planted(text, tuple(spans), negative)


def records(name: str, count: int, seed: int) -> list[Planted]:
    """`count` records from a template file, every template equally often; `name` ends in zh.txt or en.txt."""
    makers = zh_makers(seed) if name.endswith("zh.txt") else en_makers(seed)
    templates = read_templates(name)
    rng = random.Random(seed)
    positives = [t for t in templates if not t.startswith("!")]
    negatives = [t for t in templates if t.startswith("!")]
    made = [
        fill(negatives[i // 10 % len(negatives)] if i % 10 == 9 else positives[i % len(positives)], makers)
        for i in range(count)
    ]
    rng.shuffle(made)
    return made


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def luhn(rng: random.Random, prefix: str, length: int) -> str:
    body = prefix + digits(rng, length - len(prefix) - 1)
    total = sum(sum(divmod(int(d) * (2 if i % 2 == 0 else 1), 10)) for i, d in enumerate(reversed(body)))
    return body + str(-total % 10)


def id_card(rng: random.Random) -> str:
    birth = f"{rng.randint(1945, 2015)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"
    body = f"{rng.choice((11, 13, 21, 31, 32, 33, 37, 41, 44, 51, 61, 65))}{digits(rng, 4)}{birth}{digits(rng, 3)}"
    check = "10X98765432"[sum(int(d) * w for d, w in zip(body, ID_WEIGHTS, strict=True)) % 11]
    return body + (check.lower() if rng.random() < 0.2 else check)


def uscc(rng: random.Random) -> str:
    body = "91" + digits(rng, 6) + "".join(rng.choice(USCC_ALPHABET) for _ in range(9))
    total = sum(USCC_ALPHABET.index(c) * w for c, w in zip(body, USCC_WEIGHTS, strict=True))
    return body + USCC_ALPHABET[-total % 31]


def spaced(text: str, groups: tuple[int, ...], mark: str) -> str:
    parts, start = [], 0
    for size in groups:
        parts.append(text[start : start + size])
        start += size
    return mark.join([*parts, text[start:]]) if text[start:] else mark.join(parts)


def wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def iban(rng: random.Random) -> str:
    body = "".join(rng.choice("ABCDEFGH") for _ in range(4)) + digits(rng, 14)
    number = "".join(str(int(c, 36)) for c in body + "GB00")
    return f"GB{98 - int(number) % 97:02d}{body}"


def npi(rng: random.Random) -> str:
    return luhn(rng, "808401" + digits(rng, 8), 15)[5:]


def vin(rng: random.Random) -> str:
    letters = "ABCDEFGHJKLMNPRSTUVWXYZ0123456789"
    values = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", [*range(1, 9), *range(1, 6), 7, 9, *range(2, 10)], strict=True))
    body = ["L"] + [rng.choice(letters) for _ in range(10)] + list(digits(rng, 6))
    weights = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
    total = sum((values.get(c) or int(c)) * w for c, w in zip(body, weights, strict=True) if w)
    body[8] = "0123456789X"[total % 11]
    return "".join(body)


def mac(rng: random.Random) -> str:
    return ":".join(f"{rng.randrange(256):02X}" for _ in range(6))


def zh_makers(seed: int) -> dict[str, tuple[str, Callable[[], str]]]:
    """Slot -> (type, maker) for the Chinese templates."""
    from faker import Faker

    rng = random.Random(f"zh{seed}")
    faker = Faker("zh_CN")
    faker.seed_instance(seed)

    def name() -> str:
        roll = rng.random()
        if roll < 0.06:
            return rng.choice(MINORITY)
        return rng.choice(COMPOUND) + faker.first_name() if roll < 0.14 else faker.name()

    def date() -> str:
        year, month, day = rng.randint(1950, 2025), rng.randint(1, 12), rng.randint(1, 28)
        return rng.choice(
            (f"{year}年{month}月{day}日", f"{year}-{month:02d}-{day:02d}", f"{year}/{month}/{day}",
             f"{year}.{month:02d}.{day:02d}", f"{year}年{month:02d}月{day:02d}日")
        )  # fmt: skip

    def mobile() -> str:
        return rng.choice(["13", "15", "17", "18", "19"]) + rng.choice("0356789") + digits(rng, 8)

    def plate() -> str:
        head = rng.choice(PROVINCES) + rng.choice("ABCDEFGH") + rng.choice(("", "", "·"))
        return head + (
            rng.choice("DF") + digits(rng, 5) if rng.random() < 0.3 else rng.choice("ABCDEFGHJK") + digits(rng, 4)
        )

    def card() -> str:
        return luhn(rng, rng.choice(BINS), rng.choice((16, 19)))

    simple: dict[str, tuple[str, Callable[[], str]]] = {
        "name": ("PERSON", name),
        "surname": ("PERSON", faker.last_name),
        "compound": ("PERSON", lambda: rng.choice(COMPOUND) + faker.first_name()),
        "org": ("ORGANIZATION", faker.company),
        "address": ("ADDRESS", lambda: faker.address().split(" ")[0] + f"{rng.randint(1, 30)}号楼{rng.randint(101, 2404)}室"),
        "mobile": ("PHONE", mobile),
        "mobile_spaced": ("PHONE", lambda: spaced(mobile(), (3, 4), rng.choice(" -"))),
        "mobile_wide": ("PHONE", lambda: wide(mobile())),
        "landline": ("PHONE", lambda: rng.choice(("010-", "021-", "0755-", "0571-", "(020)")) + rng.choice("345678") + digits(rng, 7)),
        "id": ("ID_CARD", lambda: id_card(rng)),
        "id15": ("ID_CARD", lambda: f"{rng.choice((11, 31, 44, 51))}{digits(rng, 4)}{rng.randint(45, 85)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{digits(rng, 3)}"),
        "card": ("CARD", card),
        "card_spaced": ("CARD", lambda: spaced(luhn(rng, rng.choice(BINS), 19), (4, 4, 4, 4), " ")),
        "account": ("ACCOUNT", lambda: digits(rng, rng.choice((12, 15, 17)))),
        "uscc": ("COMPANY_ID", lambda: uscc(rng)),
        "plate": ("VEHICLE", plate),
        "vin": ("VEHICLE", lambda: vin(rng)),
        "passport": ("PASSPORT", lambda: rng.choice("EG") + digits(rng, 8) if rng.random() < 0.6 else "E" + rng.choice("ABCDEFGH") + digits(rng, 7)),
        "hkpermit": ("PERMIT", lambda: rng.choice("HM") + digits(rng, 8)),
        "email": ("EMAIL", faker.email),
        "wechat": ("SOCIAL", lambda: rng.choice(("wx_", "wxid_", "abc", "lucky")) + digits(rng, 6)),
        "qq": ("SOCIAL", lambda: rng.choice("123456789") + digits(rng, rng.choice((7, 8, 9)))),
        "ssc": ("SOCIAL_SECURITY", lambda: rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") + digits(rng, 8)),
        "medical": ("HEALTH_PLAN", lambda: digits(rng, rng.choice((10, 12)))),
        "mrn": ("MRN", lambda: rng.choice(("", "ZY", "BL")) + digits(rng, rng.choice((6, 8, 10)))),
        "student": ("STUDENT", lambda: rng.choice(("", "G", "S")) + f"{rng.randint(2015, 2024)}" + digits(rng, 6)),
        "exam": ("STUDENT", lambda: digits(rng, rng.choice((9, 12, 14)))),
        "employee": ("EMPLOYEE", lambda: rng.choice(("", "E", "YG")) + digits(rng, rng.choice((5, 6)))),
        "policy": ("HEALTH_PLAN", lambda: rng.choice(("P", "PICC", "")) + digits(rng, rng.choice((10, 12, 15)))),
        "ip": ("IP", faker.ipv4),
        "url": ("URL", faker.url),
        "mac": ("DEVICE", lambda: mac(rng)),
        "date": ("DATE", date),
    }  # fmt: skip
    return simple


def en_makers(seed: int) -> dict[str, tuple[str, Callable[[], str]]]:
    """Slot -> (type, maker) for the English templates."""
    from faker import Faker

    rng = random.Random(f"en{seed}")
    faker = Faker("en_US")
    faker.seed_instance(seed)
    locales = "en_GB de_DE de_AT de_CH fr_FR es_ES it_IT nl_NL nl_BE pl_PL sv_SE en_IN pt_BR pt_PT da_DK fi_FI hu_HU cs_CZ sl_SI hr_HR no_NO en_NZ et_EE tr_TR vi_VN id_ID ro_RO sk_SK lt_LT lv_LV fil_PH en_NG yo_NG zu_ZA tw_GH az_AZ es_MX en_IE fr_CA"
    world = Faker(locales.split())
    world.seed_instance(seed)
    months = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ]

    def either(mine: Callable[[], str], others: Callable[[], str], share: float = 0.5) -> Callable[[], str]:
        return lambda: others() if rng.random() < share else mine()

    def name() -> str:
        source = world if rng.random() < 0.5 else faker
        middle = f" {rng.choice('ABCDEFGHJKLMNPRST')}." if rng.random() < 0.1 else ""
        return f"{source.first_name()}{middle} {source.last_name()}"

    def date() -> str:
        year, month, day = rng.randint(1930, 2025), rng.randint(1, 12), rng.randint(1, 28)
        return rng.choice(
            (f"{month:02d}/{day:02d}/{year}", f"{year}-{month:02d}-{day:02d}", f"{months[month - 1]} {day}, {year}",
             f"{day} {months[month - 1]} {year}", f"{months[month - 1][:3]} {day} {year}")
        )  # fmt: skip

    return {
        "street": ("ADDRESS", either(faker.street_address, world.street_address)),
        "streetname": ("ADDRESS", either(faker.street_name, world.street_name)),
        "building": ("ADDRESS", lambda: str(rng.randint(1, 399))),
        "unit": ("ADDRESS", lambda: f"{rng.choice(('apartment', 'Apt.', 'Suite', 'flat'))} {rng.randint(1, 399)}"),
        "country": ("", faker.country),
        "name": ("PERSON", name),
        "wordname": ("PERSON", lambda: f"{rng.choice(WORD_FIRST.split())} {rng.choice(WORD_LAST.split()) if rng.random() < 0.4 else faker.last_name()}"),
        "camel": ("PERSON", lambda: "".join([faker.first_name(), *([faker.first_name()] if rng.random() < 0.2 else []), faker.last_name()])),
        "upper": ("PERSON", lambda: rng.choice(("{1}, {0}", "{0} {1}")).format(faker.first_name(), world.last_name()).upper()),
        "initialed": ("PERSON", lambda: rng.choice(("{0}. {1}", "{0}. {2}. {1}", "{1} {0}.")).format(rng.choice("ABCDEFGHJKLMPRST"), faker.last_name(), rng.choice("ABCDEFGHJKLMPRST"))),
        "doublelast": ("PERSON", lambda: f"{faker.last_name()}-{world.last_name()}"),
        "first": ("PERSON", either(faker.first_name, world.first_name)),
        "last": ("PERSON", either(faker.last_name, world.last_name)),
        "org": ("ORGANIZATION", either(faker.company, world.company)),
        "hospital": ("ORGANIZATION", lambda: f"{faker.last_name()} {rng.choice(('Memorial Hospital', 'Clinic', 'Medical Center'))}"),
        "address": ("ADDRESS", either(lambda: faker.address().replace("\n", rng.choice((", ", "\n"))), lambda: world.address().replace("\n", ", "))),
        "city": ("LOCATION", faker.city),
        "statecode": ("LOCATION", faker.state_abbr),
        "zip": ("LOCATION", faker.postcode),
        "phone": ("PHONE", either(faker.phone_number, world.phone_number)),
        "email": ("EMAIL", faker.email),
        "card": ("CARD", faker.credit_card_number),
        "ssn": ("SSN", faker.ssn),
        "mrn": ("MRN", lambda: rng.choice(("", "M")) + digits(rng, 8)),
        "npi": ("LICENCE", lambda: npi(rng)),
        "mbi": ("HEALTH_PLAN", lambda: "1EG4-TE5-MK7" + rng.choice("23456789")),
        "iban": ("ACCOUNT", lambda: iban(rng)),
        "account": ("ACCOUNT", lambda: digits(rng, rng.choice((8, 10, 12)))),
        "routing": ("ACCOUNT", lambda: "021000021"),
        "passport": ("PASSPORT", lambda: digits(rng, 9)),
        "license": ("LICENCE", lambda: rng.choice("ABCDEFGHS") + digits(rng, 7)),
        "vin": ("VEHICLE", lambda: vin(rng)),
        "usplate": ("VEHICLE", lambda: f"{rng.randint(1, 9)}{''.join(rng.choice('ABCDEFGH') for _ in range(3))}{digits(rng, 3)}"),
        "mac": ("DEVICE", lambda: mac(rng)),
        "ip": ("IP", faker.ipv4),
        "url": ("URL", faker.url),
        "age": ("AGE", lambda: str(rng.randint(90, 104))),
        "date": ("DATE", date),
    }  # fmt: skip


# presidio-evaluator's slots -> the type planted; an empty type is neutral: neither asked for nor counted against.
HELD_EN = {
    **dict.fromkeys(["person", "name", "name_female", "name_male", "first_name", "last_name", "first_name_male", "first_name_female"], "PERSON"),
    **dict.fromkeys(["first_name_nonbinary", "last_name_female", "last_name_male"], "PERSON"),
    **dict.fromkeys(["address", "street_name", "building_number", "secondary_address", "postcode", "zipcode"], "ADDRESS"),
    "credit_card_number": "CARD", "phone_number": "PHONE", "email": "EMAIL", "iban": "ACCOUNT", "ip_address": "IP",
    "ssn": "SSN", "us_driver_license": "LICENCE", "date_of_birth": "DATE", "url": "URL",
}  # fmt: skip


def presidio_records(raw_data: Path, count: int, seed: int) -> tuple[list[Planted], list[list[tuple[int, int]]]]:
    """presidio-evaluator's templates filled with its people; returns the records and each one's neutral spans.

    `raw_data` is the package's data_generator/raw_data. 5 % of the sentences are lower-case, as upstream's. Slots of
    one sentence are drawn each anew, as upstream's. Card numbers are made here: the list's are damaged (5.1E+15).
    """
    templates = [t.replace("\\n", "\n") for t in (raw_data / "templates.txt").read_text(encoding="utf-8").splitlines()]
    templates = [t for t in templates if t.strip() and "hospital" not in t.lower()]
    with (raw_data / "FakeNameGenerator.com_3000.csv").open(encoding="utf-8-sig", newline="") as file:
        people = list(csv.DictReader(file))
    with (raw_data / "nationalities.csv").open(encoding="utf-8-sig", newline="") as file:
        nations = [row for row in csv.DictReader(file) if row["nationality"]]
    with (raw_data / "companies_and_organizations.csv").open(encoding="utf-8-sig", newline="") as file:
        companies = [row["organization"] for row in csv.DictReader(file)]
    rng = random.Random(seed)
    out, neutral = [], []
    for i in range(count):
        text, spans, other = "", [], []
        for part in re.split(r"(\{\{.*?\}\})", templates[i % len(templates)]):
            if not part.startswith("{{"):
                text += part
                continue
            slot = part[2:-2].strip()
            value = _presidio_value(slot, rng.choice(people), rng.choice(nations), rng.choice(companies), rng)
            if slot in HELD_EN:
                spans.append((len(text), len(text) + len(value), HELD_EN[slot]))
            else:
                other.append((len(text), len(text) + len(value)))
            text += value
        out.append(Planted(text.lower() if i % 20 == 7 and len(text.lower()) == len(text) else text, tuple(spans)))
        neutral.append(other)
    return out, neutral


def _presidio_value(slot: str, person: dict[str, str], nation: dict[str, str], company: str, rng: random.Random) -> str:
    street = person["StreetAddress"]
    number = re.search(r"\d+\S*", street)
    name = f"{person['GivenName']} {person['Surname']}"
    if slot in ("person", "name", "name_female", "name_male"):
        return name if rng.random() < 0.8 else f"{person['GivenName']} {person['MiddleInitial']}. {person['Surname']}"
    if slot.startswith("first_name"):
        return person["GivenName"]
    if slot.startswith("last_name"):
        return person["Surname"]
    values = {
        "organization": company,
        "address": rng.choice(
            (f"{street}, {person['City']}, {person['State']} {person['ZipCode']}",
             f"{street}\n {person['City']}, {person['ZipCode']}\n {person['CountryFull']}",
             f"{street}, {person['City']}, {person['CountryFull']} {person['ZipCode']}", street)
        ),
        "city": person["City"], "country": person["CountryFull"], "postcode": person["ZipCode"], "zipcode": person["ZipCode"],
        "street_name": re.sub(r"\d+\S*", "", street).strip(" ,") or "Main Street",
        "building_number": number.group() if number else str(rng.randint(1, 999)),
        "secondary_address": f"{rng.choice(('Apt.', 'Suite'))} {rng.randint(1, 999)}",
        "credit_card_number": luhn(rng, rng.choice(("4", "51", "34", "6011")), 16), "phone_number": person["TelephoneNumber"], "email": person["EmailAddress"],
        "age": person["Age"], "nationality": nation["nationality"], "nation_woman": nation["woman"] or nation["nationality"],
        "nation_plural": nation["plural"] or nation["nationality"], "year": str(rng.randint(1960, 2024)), "url": person["Domain"],
        "job": person["Occupation"], "iban": iban(rng), "prefix": "Dr.", "prefix_male": "Mr.", "prefix_female": "Mrs.",
        "date_of_birth": person["Birthday"], "date_time": f"{rng.randint(2000, 2024)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "ip_address": ".".join(str(rng.randint(1, 254)) for _ in range(4)),
        "ssn": f"{rng.randint(100, 665):03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}",
        "state_abbr": person["State"][:2] or "NY", "day_of_week": rng.choice(["Monday", "Tuesday", "Friday", "Sunday"]),
        "us_driver_license": rng.choice("ABCDFS") + digits(rng, 7),
    }  # fmt: skip
    return values[slot]
