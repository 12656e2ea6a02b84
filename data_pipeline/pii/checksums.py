"""Which numbers can be what they look like: check digits and rules of issuing bodies, each with its source."""

import re
from datetime import date

# Letters of an IBAN's country and the whole length (SWIFT IBAN registry, the countries with most accounts).
IBAN_LENGTHS = {
    **{"AD": 24, "AE": 23, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "CH": 21, "CR": 22},
    **{"CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27},
    **{"GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27},
    **{"JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22},
    **{"MK": 19, "MT": 31, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24},
    **{"SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26, "UA": 29},
}
CARD_PREFIX = re.compile(r"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3[47]|30[0-5]|3[689]|35|6")
RESIDENT_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
RESIDENT_CHECK = "10X98765432"
DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
NIE_DIGIT = {"X": "0", "Y": "1", "Z": "2"}
FISCAL_ODD = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (
            *(1, 0, 5, 7, 9, 13, 15, 17, 19, 21),
            *(1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23),
        ),
        strict=True,
    )
)


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: the check digit of payment cards."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def payment_card(digits: str) -> bool:
    """13 to 19 digits of an issuer that exists, with Luhn's check digit, and not one digit throughout."""
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and bool(CARD_PREFIX.match(digits)) and luhn(digits)


def iban(text: str) -> bool:
    """ISO 13616: length by country, and the number with its first four characters behind it is 1 modulo 97."""
    if len(text) != IBAN_LENGTHS.get(text[:2]):
        return False
    return int("".join(str(int(mark, 36)) for mark in text[4:] + text[:4])) % 97 == 1


def _is_date(year: int, month: int, day: int) -> bool:
    try:
        return 1900 <= date(year, month, day).year <= 2100
    except ValueError:
        return False


def chinese_resident(text: str) -> bool:
    """GB 11643-1999: six digits of a region, date of birth, three digits, check character by ISO 7064 mod 11-2."""
    if not re.fullmatch(r"[1-8]\d{16}[0-9X]", text) or not _is_date(
        int(text[6:10]), int(text[10:12]), int(text[12:14])
    ):
        return False
    total = sum(int(digit) * weight for digit, weight in zip(text[:17], RESIDENT_WEIGHTS, strict=True))
    return RESIDENT_CHECK[total % 11] == text[17]


def spanish_dni(text: str) -> bool:
    """DNI (eight digits, a letter) and NIE (X, Y or Z, seven digits, a letter): the letter is the number modulo 23."""
    number = NIE_DIGIT.get(text[0], text[0]) + text[1:8]
    return len(text) == 9 and number.isdigit() and DNI_LETTERS[int(number) % 23] == text[8]


def french_nir(digits: str) -> bool:
    """Numéro de sécurité sociale: 13 digits (2A, 2B for Corsica) and a key, 97 less the number modulo 97."""
    if not re.fullmatch(r"[1-478]\d{2}(0[1-9]|1[0-2]|[2-9]\d)(\d{2}|2[AB])\d{6}\d{2}", digits):
        return False
    number = int(digits[:13].replace("2A", "19").replace("2B", "18"))
    return 97 - number % 97 == int(digits[13:])


def us_social_security(digits: str) -> bool:
    """Social Security Administration: no area 000, 666 or 9xx, no group 00, no serial 0000; no check digit exists."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def brazilian_cpf(digits: str) -> bool:
    """CPF: two check digits, each 11 less the weighted sum modulo 11 (10 and 11 count as 0)."""
    if len(digits) != 11 or len(set(digits)) == 1:
        return False
    for count in (9, 10):
        total = sum(int(digit) * (count + 1 - place) for place, digit in enumerate(digits[:count]))
        if (total * 10 % 11) % 10 != int(digits[count]):
            return False
    return True


def italian_fiscal_code(text: str) -> bool:
    """Codice fiscale (D.M. 23/12/1976): odd places by a table, even ones by value, sum modulo 26 as a letter."""
    total = sum(
        (FISCAL_ODD[mark] if place % 2 == 0 else int(mark, 36) - 10 * mark.isalpha())
        for place, mark in enumerate(text[:15])
    )
    return chr(ord("A") + total % 26) == text[15]
