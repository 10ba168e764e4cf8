"""Secrets and personal data in rows: counted, never repeated.

The patterns find what has a form of its own. A name, an address or a plain password has none, so a count of 0 proves nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address
from typing import Any

from lib.core.examples import Example
from lib.data.quality.text import parts

FIRST_IDS = 10
_GAP = r"[ -]?"


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _is_card(text: str) -> bool:
    """The checksum of payment cards. Source: ISO/IEC 7812-1, Luhn."""
    digits = [int(digit) for digit in reversed(_digits(text))]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """The checksum of bank accounts. Source: ISO 13616, modulo 97."""
    compact = text.replace(" ", "")
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def _is_public_address(text: str) -> bool:
    try:
        return IPv4Address(text).is_global
    except AddressValueError:
        return False


def _always(_: str) -> bool:
    return True


PATTERNS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "private_key": (re.compile(r"-----BEGIN (?:[A-Z]{2,10} ){0,2}PRIVATE KEY-----"), _always),
    "aws_access_key": (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", re.ASCII), _always),
    "github_token": (re.compile(r"\b(?:gh[opsur]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,90})\b", re.ASCII), _always),
    "google_api_key": (re.compile(r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", re.ASCII), _always),
    "slack_token": (re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,250}", re.ASCII), _always),
    "hugging_face_token": (re.compile(r"\bhf_[A-Za-z0-9]{30,40}\b", re.ASCII), _always),
    "model_api_key": (re.compile(r"\bsk-(?:[a-z]{2,10}-)?[A-Za-z0-9_-]{20,200}", re.ASCII), _always),
    "json_web_token": (
        re.compile(r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{10,1000}", re.ASCII),
        _always,
    ),
    "email": (
        re.compile(
            r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b",
            re.ASCII,
        ),
        _always,
    ),
    "phone": (re.compile(r"(?<![\w+])\+[1-9](?:[ ().-]{0,2}[0-9]){7,14}(?![0-9])", re.ASCII), _always),
    "payment_card": (re.compile(rf"(?<![0-9-])[2-6][0-9]{{3}}(?:{_GAP}[0-9]{{4}}){{2}}{_GAP}[0-9]{{1,7}}(?![0-9-])"), _is_card),
    "iban": (re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", re.ASCII), _is_iban),
    "us_social_security_number": (
        re.compile(r"(?<![0-9-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![0-9-])"),
        _always,
    ),
    "ip_address": (re.compile(r"(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9.])"), _is_public_address),
}
"""Kind -> its form, and what else must hold. Each is bounded, so that no text makes it slow."""


@dataclass
class Found:
    """Of one kind."""

    hits: int = 0
    rows: int = 0
    first_ids: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """What was found in the rows so far, by kind."""

    by_kind: dict[str, Found] = field(default_factory=dict)

    def add(self, example: Example) -> None:
        """Look through a row."""
        texts = [text for _, text in parts(example)]
        for kind, (pattern, holds) in PATTERNS.items():
            hits = sum(holds(match[0]) for text in texts for match in pattern.finditer(text))
            if hits:
                found = self.by_kind.setdefault(kind, Found())
                found.hits += hits
                found.rows += 1
                if len(found.first_ids) < FIRST_IDS:
                    found.first_ids.append(example.sample_id)

    def to_json(self) -> dict[str, Any]:
        return {kind: vars(found) for kind, found in sorted(self.by_kind.items())}
