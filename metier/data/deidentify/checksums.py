"""Check digits: each function takes the characters of one number, without separators, and says whether it is valid."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable

_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_USCC = {char: value for value, char in enumerate("0123456789ABCDEFGHJKLMNPQRTUWXY")}
_VIN = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", (*range(1, 9), *range(1, 6), 7, 9, *range(2, 10)), strict=True))
_VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
_PROVINCES = {11, 12, 13, 14, 15, 21, 22, 23, 31, 32, 33, 34, 35, 36, 37, 41, 42, 43, 44, 45, 46, 50, 51, 52, 53, 54}
_PROVINCES |= {61, 62, 63, 64, 65, 71, 81, 82, 83}


def luhn(number: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for position, char in enumerate(reversed(number)):
        digit = int(char) * (1 + position % 2)
        total += digit - 9 if digit > 9 else digit
    return total % 10 == 0


def card(number: str) -> bool:
    """A bank or credit card: 13 to 19 digits, a card's first digit, Luhn."""
    return 13 <= len(number) <= 19 and number[0] in "23456789" and len(set(number)) > 2 and luhn(number)


def id_card(number: str) -> bool:
    """GB 11643: a Chinese identity number of 18 (with its check digit) or 15 characters. Any county code is taken."""
    if len(number) == 15:
        return int(number[:2]) in _PROVINCES and _is_date("19" + number[6:12])
    if not _is_date(number[6:14]):
        return False
    total = sum(int(digit) * weight for digit, weight in zip(number, _ID_WEIGHTS, strict=False))
    return number[17].upper() == "10X98765432"[total % 11]


def id_shape(number: str) -> bool:
    """18 characters with a province and a date of birth, whatever the check digit: mistyped ones are people's too."""
    return int(number[:2]) in _PROVINCES and _is_date(number[6:14])


def uscc(number: str) -> bool:
    """GB 32100: the unified social credit code, modulo 31."""
    if number.isdigit() and len(set(number)) < 3:
        return False
    total = sum(_USCC[char] * pow(3, position, 31) for position, char in enumerate(number[:17]))
    return _USCC[number[17]] == -total % 31


def iban(number: str) -> bool:
    """ISO 13616: modulo 97 over the rearranged characters."""
    return int("".join(str(int(char, 36)) for char in (number[4:] + number[:4]).upper())) % 97 == 1


def vin(number: str) -> bool:
    """ISO 3779 with the check digit of 49 CFR 565."""
    if number.isdigit() or number.isalpha():
        return False
    total = sum((_VIN.get(c) or int(c)) * weight for c, weight in zip(number, _VIN_WEIGHTS, strict=True))
    return number[8] == "0123456789X"[total % 11]


def npi(number: str) -> bool:
    """The US National Provider Identifier: Luhn over 80840 and the ten digits."""
    return luhn("80840" + number)


def dea(number: str) -> bool:
    """A DEA registration: two letters, seven digits."""
    digits = [int(char) for char in number[-7:]]
    return (digits[0] + digits[2] + digits[4] + 2 * (digits[1] + digits[3] + digits[5])) % 10 == digits[6]


def isin(number: str) -> bool:
    """ISO 6166, a security's number: Luhn over letters read as base 36."""
    return luhn("".join(str(int(char, 36)) for char in number))


def ip(number: str) -> bool:
    """An IP address that is not a section number such as 1.2.3.4."""
    try:
        address = ipaddress.ip_address(number)
    except ValueError:
        return False
    return address.version == 6 or any(int(part) > 9 for part in number.split("."))


def ssn(number: str) -> bool:
    """US Social Security number, or an ITIN (9xx): the areas and groups that were never given are not one."""
    return number[:3] not in ("000", "666") and number[3:5] != "00" and number[5:] != "0000"


def _is_date(text: str) -> bool:
    try:
        datetime.date(int(text[:4]), int(text[4:6]), int(text[6:8]))
    except ValueError:
        return False
    return "18" <= text[:2] <= "20"


CHECKS: dict[str, Callable[[str], bool]] = {
    check.__name__: check for check in (luhn, card, id_card, id_shape, uscc, iban, vin, npi, dea, isin, ip, ssn)
}


def is_valid(name: str, value: str) -> bool:
    """Whether `value` passes the check `name`; separators are left out first, except an address's dots and colons."""
    return CHECKS[name](value if name == "ip" else re.sub(r"[^0-9A-Za-z]", "", value).upper())
