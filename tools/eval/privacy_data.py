"""Texts with personal data in known places, and texts that only look like it: templates and generators, by a seed.

Made for measuring a detector, not after it: names are a list of its own, most of them unknown to the detector's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

_GIVEN = """
Anna Thomas Maria Peter Laura Daniel Priya Mohammed Ingeborg Thaddeus Xiomara Oluwaseun Nkechi Bronwyn Caoimhe Iskander
Tuomas Zsófia Ottilie Kwabena Anneke Leocadia Jedediah Mireille Søren Ioana Radomir Tamsin Wenceslao Yevgenia Håkon
""".split()  # noqa: SIM905
_FAMILY = """
Keller Smith García Okafor Lindqvist Papadopoulos Nguyen O'Brien Dubois Kowalczyk Rossi van-Dijk Yamamoto Haddad Szabó
Fitzgerald Oyelaran Bergström Castellanos Müller-Lüdenscheidt Achterberg Quartermaine Featherstone Delacroix Petrović
""".split()  # noqa: SIM905
_STREETS = "Maple Kestrel Station Church Victoria Mill Orchard Queen's Elm Harbour".split()  # noqa: SIM905
_TYPES = "Street Road Avenue Lane Drive Close Gardens St. Rd Boulevard".split()  # noqa: SIM905
_CITIES = "Norwich Leeds Bristol Denver Portland Austin Dublin Toronto".split()  # noqa: SIM905
_MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
_WORDS = "quartz lemon harbor violet tiger copper maple rocket winter marble".split()  # noqa: SIM905

Make = Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class Planted:
    """`text[start:end]` is personal, of this `group`."""

    text: str
    start: int
    end: int
    group: str


def _digits(dice: random.Random, count: int) -> str:
    return "".join(str(dice.randrange(10)) for _ in range(count))


def _name(dice: random.Random) -> str:
    return f"{dice.choice(_GIVEN)} {dice.choice(_FAMILY)}"


def _email(dice: random.Random) -> str:
    given, family = (dice.choice(names).lower().replace("'", "") for names in (_GIVEN, _FAMILY))
    local = dice.choice([f"{given}.{family}", f"{given[0]}{family}", f"{given}{dice.randrange(100)}", f"{family}+news"])
    return f"{local}@{dice.choice(_WORDS)}.{dice.choice(['com', 'org', 'de', 'co.uk', 'fr', 'io'])}"


def _phone(dice: random.Random) -> str:
    """A number of a country that is written with +, or of Britain or the United States as it is written there."""
    phones = import_module("phonenumbers")
    region = dice.choice(["GB", "US", "DE", "FR", "ES", "NL", "PL", "SE", "BR", "IN", "JP"])
    example = str(phones.example_number(region).national_number)
    while True:
        number = phones.PhoneNumber(
            country_code=phones.country_code_for_region(region),
            national_number=int(example[:4] + _digits(dice, len(example) - 4)),
        )
        if phones.is_valid_number(number):
            forms = [phones.PhoneNumberFormat.INTERNATIONAL, phones.PhoneNumberFormat.E164]
            forms += [phones.PhoneNumberFormat.NATIONAL] * 2 if region in ("GB", "US") else []
            written: str = phones.format_number(number, dice.choice(forms))
            return written.replace(" ", dice.choice(" .-")) if dice.random() < 0.3 else written


def _card(dice: random.Random) -> str:
    prefix, length = dice.choice([("4", 16), ("51", 16), ("2221", 16), ("37", 15), ("6011", 16), ("3528", 16)])
    bare = prefix + _digits(dice, length - len(prefix) - 1)
    bare += import_module("stdnum.luhn").calc_check_digit(bare)
    separator = dice.choice(["", " ", "-"])
    return separator.join(bare[at : at + 4] for at in range(0, length, 4))


def _iban(dice: random.Random) -> str:
    iban = import_module("stdnum.iban")
    country, account = dice.choice(
        [
            ("DE", _digits(dice, 18)),
            ("GB", "NWBK" + _digits(dice, 14)),
            ("NL", "ABNA" + _digits(dice, 10)),
            ("AT", _digits(dice, 16)),
            ("CH", _digits(dice, 17)),
            ("PL", _digits(dice, 24)),
        ]
    )
    whole = country + iban.calc_check_digits(country + "00" + account) + account
    if not iban.is_valid(whole):  # some countries have check digits of their own inside
        return _iban(dice)
    return " ".join(whole[at : at + 4] for at in range(0, len(whole), 4)) if dice.random() < 0.6 else whole


def _valid(module: str, draw: Make) -> Make:
    def make(dice: random.Random) -> str:
        valid = import_module(f"stdnum.{module}").is_valid
        while not valid(written := draw(dice)):
            pass
        return written

    return make


def _day(dice: random.Random) -> tuple[int, int, int]:
    return dice.randint(1, 28), dice.randint(1, 12), dice.randint(1940, 2009)


def _short_day(dice: random.Random, form: str) -> str:
    day, month, year = _day(dice)
    return form.format(d=day, m=month, y=year % 100)


def _check_letter(dice: random.Random) -> str:
    number = dice.randrange(10**7, 10**8)
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


_IDS: tuple[Make, ...] = (
    _valid("us.ssn", lambda dice: f"{_digits(dice, 3)}-{_digits(dice, 2)}-{_digits(dice, 4)}"),
    _valid("de.idnr", lambda dice: str(dice.randint(1, 9)) + _digits(dice, 10)),
    _valid("pl.pesel", lambda dice: _short_day(dice, "{y:02}{m:02}{d:02}") + _digits(dice, 5)),
    _valid("ch.ssn", lambda dice: f"756.{_digits(dice, 4)}.{_digits(dice, 4)}.{_digits(dice, 2)}"),
    _valid(
        "fi.hetu", lambda dice: _short_day(dice, "{d:02}{m:02}{y:02}-") + _digits(dice, 3) + dice.choice("ABCDEFHJK")
    ),
    _valid("es.dni", _check_letter),
    _valid("br.cpf", lambda dice: f"{_digits(dice, 3)}.{_digits(dice, 3)}.{_digits(dice, 3)}-{_digits(dice, 2)}"),
    lambda dice: (
        f"{dice.choice('ABCEH')}{dice.choice('ABEGH')} {_digits(dice, 2)} {_digits(dice, 2)} {_digits(dice, 2)} C"
    ),
)


def _birth(dice: random.Random) -> str:
    day, month, year = _day(dice)
    return dice.choice(
        [
            f"{day} {_MONTHS[month - 1]} {year}",
            f"{_MONTHS[month - 1]} {day}, {year}",
            f"{day:02}/{month:02}/{year}",
            f"{year}-{month:02}-{day:02}",
            f"{day}.{month}.{year}",
        ]
    )


def _address(dice: random.Random) -> str:
    number, city = dice.randint(1, 300), dice.choice(_CITIES)
    return dice.choice(
        [
            f"{number} {dice.choice(_STREETS)} {dice.choice(_TYPES)}, {city}",
            f"{number} {dice.choice(_STREETS)} {dice.choice(_TYPES)}, {city}, CO {_digits(dice, 5)}",
            f"{dice.choice(['Haupt', 'Schiller', 'Goethe'])}straße {number}, {_digits(dice, 5)} Berlin",
            f"{number} rue de la {dice.choice(['Paix', 'Gare', 'Fontaine'])}, 75{_digits(dice, 3)} Paris",
            f"Calle {dice.choice(['Mayor', 'Real', 'Nueva'])} {number}, {_digits(dice, 5)} Sevilla",
            f"P.O. Box {_digits(dice, 4)}, {city}",
        ]
    )


def _secret(dice: random.Random) -> str:
    return f"{dice.choice(_WORDS)}{dice.choice('-_!#')}{dice.choice(_WORDS).title()}{dice.randrange(10, 99)}"


def _key(dice: random.Random) -> str:
    letters = "".join(dice.choice("ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnpqrstuvwxyz23456789") for _ in range(36))
    return dice.choice([f"sk-{letters}", f"ghp_{letters}", f"AKIA{letters[:16].upper()}", f"AIza{letters}"])


def _url(dice: random.Random) -> str:
    host = f"{dice.choice(_WORDS)}.example.org"
    return dice.choice(
        [
            f"https://{dice.choice(_WORDS)}:{_secret(dice)[:12].replace('#', 'x')}@{host}/x",
            f"https://{host}/?token={_digits(dice, 12)}",
        ]
    )


def _ip(dice: random.Random) -> str:
    if dice.random() < 0.3:
        return ":".join(f"{dice.randrange(1, 65536):x}" for _ in range(8))
    return ".".join(str(dice.randrange(1, 255)) for _ in range(4))


def _mac(dice: random.Random) -> str:
    return dice.choice(":-").join(f"{dice.randrange(256):02x}" for _ in range(6))


_GROUPS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "name after a cue": (  # in English, German and French
        _name,
        (
            "My name is {}, can you help?",
            "Dear {},\nthank you.",
            "Patient: {}\nAge: 41",
            "Ask Mrs {} first.",
            "Best regards,\n{}",
            "My sister {} is coming.",
            "Ich heiße {} und brauche Hilfe.",
            "Je m'appelle {}, bonjour.",
            "Talk to Dr. {} today.",
        ),
    ),
    "name in running text": (
        _name,
        ("Yesterday {} called about the invoice.", "The meeting with {} was moved.", "{} will pay for it."),
    ),
    "email": (_email, ("Write to {} please.", "({})", '{{"email": "{}"}}', "mail: {}.")),
    "phone": (_phone, ("Call me on {} tonight.", "Phone: {}", "My number is {}, ask for me.", "tel:{}")),
    "card": (_card, ("Charge {} for it.", "Card number: {} exp 11/29", "I paid with {}.")),
    "iban": (_iban, ("Transfer it to {} today.", "IBAN: {}", "My account ({}) is empty.")),
    "national id": (
        lambda dice: dice.choice(_IDS)(dice),
        ("My national ID is {}.", "Social security number {}", "ID: {}", "They have my number, {}, on file."),
    ),
    "date of birth": (_birth, ("I was born on {} in a village.", "Date of birth: {}", "DOB {}", "geboren am {}")),
    "postal address": (_address, ("I live at {}.", "Send it to {} please.", "Address: {}\n")),
    "password": (_secret, ("My password is {}.", "password: {}", "api_key = '{}'", "PIN: {}")),
    "api key": (_key, ("Use {} for now.", "export TOKEN={}", '"key": "{}"')),
    "url with credentials": (_url, ("Clone {} first.", "See {}.")),
    "ip address": (_ip, ("Ping {} again.", "The host {} is down.", "from {}:")),
    "mac address": (_mac, ("The card {} does not answer.", "MAC {}")),
}

_LOOKALIKES: tuple[Make, ...] = (
    lambda dice: f"It costs ${dice.randint(1, 9)},{_digits(dice, 3)}.{_digits(dice, 2)} or EUR {_digits(dice, 3)},-.",
    lambda dice: (
        f"Version {dice.randint(1, 9)}.{dice.randint(0, 20)}.{dice.randint(0, 20)}.{dice.randint(0, 9)} is out."
    ),
    lambda dice: (
        f"The meeting on {dice.randint(2015, 2030)}-0{dice.randint(1, 9)}-1{dice.randint(0, 9)} at 10:15 took long."
    ),
    lambda dice: f"See ISBN 978-3-16-{_digits(dice, 6)}-{_digits(dice, 1)} for details.",
    lambda dice: f"Your order {_digits(dice, 10)} was shipped, tracking {_digits(dice, 12)}.",
    lambda dice: f"Order no. {_digits(dice, 4)}-{_digits(dice, 4)} contains {dice.randint(2, 90)} items.",
    lambda dice: f"The {dice.choice(['Pixel', 'Galaxy', 'Thinkpad', 'Model'])} X{dice.randint(1, 20)} beats it.",
    lambda dice: f"In {dice.randint(1800, 2020)} the Battle of {dice.choice(['Waterloo', 'Hastings'])} changed Europe.",
    lambda dice: f"New York City and the {dice.choice(['University of Leeds', 'Royal Society', 'World Bank'])} agree.",
    lambda dice: f"for i in range({_digits(dice, 3)}): total += values[i] * 3.{_digits(dice, 9)}",
    lambda dice: f"std::vector<int> v = {{{dice.randint(1, 99)}, {dice.randint(1, 99)}, {dice.randint(1, 99)}}};",
    lambda dice: f"password = getpass.getpass()  # at least {dice.randint(8, 20)} characters",
    lambda _: "The password is required. Hello World! Dear customer, please read on.",
    lambda dice: (
        f"A total of {_digits(dice, 3)} {_digits(dice, 3)} people live here, {dice.randint(2, 90)} percent more."
    ),
    lambda dice: f"Room {dice.randint(100, 900)}, chapter {dice.randint(1, 20)}.{dice.randint(1, 9)}.",
    lambda dice: f"The commit {''.join(dice.choice('0123456789abcdef') for _ in range(40))} broke it.",
    lambda dice: f"f(x) = {dice.randint(2, 99)}x^2 - {dice.randint(2, 99)}x, at 1e-{dice.randint(3, 9)}.",
    lambda _: "Summer in Paris is lovely; Monday in London, less so. Mark the day, will you?",
    lambda dice: (
        f"192 of {_digits(dice, 4)} samples (p = 0.0{_digits(dice, 3)}) passed; see Table {dice.randint(1, 9)}."
    ),
    lambda dice: f"Latitude 52.{_digits(dice, 6)}, longitude 13.{_digits(dice, 6)}.",
)


def planted(seed: int, count: int) -> list[Planted]:
    """`count` texts of each group."""
    made = []
    for group, (make, templates) in _GROUPS.items():
        dice = random.Random(f"{seed} {group}")
        for _ in range(count):
            value = make(dice)
            before, _, after = dice.choice(templates).replace("{{", "\0").replace("}}", "\1").partition("{}")
            before, after = (part.replace("\0", "{").replace("\1", "}") for part in (before, after))
            made.append(Planted(before + value + after, len(before), len(before) + len(value), group))
    return made


def lookalikes(seed: int, count: int) -> list[str]:
    """`count` texts of each kind that hold nothing personal."""
    dice = random.Random(f"{seed} lookalikes")
    return [make(dice) for make in _LOOKALIKES for _ in range(count)]
