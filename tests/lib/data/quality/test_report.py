"""The report counts everything and repeats nothing that must not be seen."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.config.quality import CleanConfig
from lib.core.examples import Conversation, Message
from lib.data.quality.findings import PATTERNS, Findings
from lib.data.quality.report import check_rows
from lib.data.quality.statistics import TextStatistics

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def talk(number: int, question: str, answer: str = "Fine.") -> Conversation:
    return Conversation(f"r{number}", (Message("user", question), Message("assistant", answer)), f"f:{number}")


def _secret(rng: random.Random, length: int, letters: str = _LETTERS) -> str:
    return "".join(rng.choice(letters) for _ in range(length))


def _samples(rng: random.Random) -> dict[str, str]:
    """One of each kind, made here so that no file holds anything that looks like a real one."""
    return {
        "private_key": "-----BEGIN " + "RSA PRIVATE KEY-----",
        "aws_access_key": "AKIA" + _secret(rng, 16, "ABCDEFGHIJ0123456789"),
        "github_token": "ghp_" + _secret(rng, 36),
        "google_api_key": "AIza" + _secret(rng, 35),
        "slack_token": "xoxb-" + _secret(rng, 24),
        "hugging_face_token": "hf_" + _secret(rng, 34),
        "model_api_key": "sk-proj-" + _secret(rng, 40),
        "json_web_token": f"eyJ{_secret(rng, 20)}.eyJ{_secret(rng, 30)}.{_secret(rng, 43)}",
        "email": "jo.doe+x@mail.example.org",
        "phone": "+44 20 7946 0958",
        "payment_card": "4111 1111 1111 1111",  # the checksum: 30 = 8 x 2 (doubled 4) + ... ends in 0; the card of every test
        "iban": "GB82 WEST 1234 5698 7654 32",  # the example of ISO 13616
        "us_social_security_number": "123-45-6789",
        "ip_address": "8.8.4.4",
    }


def test_each_kind_is_counted_and_never_repeated() -> None:
    """Hits, rows and ids; no part of a secret is in the report, whatever it is in the row."""
    samples = _samples(random.Random(5))
    assert samples.keys() == PATTERNS.keys()
    for kind, secret in samples.items():
        rows = [talk(0, "nothing"), talk(1, f"it is {secret}, and again ({secret})."), talk(2, "x", f"{secret}")]
        report = json.dumps(check_rows(rows, CleanConfig(), {}).to_json())
        assert secret not in report and secret[4:16] not in report
        assert json.loads(report)["findings"] == {kind: {"hits": 3, "rows": 2, "first_ids": ["r1", "r2"]}}


@pytest.mark.parametrize(
    "text",
    [
        *("4111 1111 1111 1112", "0000 0000 0000 0000", "GB83 WEST 1234 5698 7654 32", "10.0.0.1", "300.1.1.1", "1.2.3.4.5"),
        *(
            "a@b",
            "2024-01-02",
            "000-12-3456",
            "12345678901234567890123",
            "call 5551234",
            "AKIA",
            "risk-taking is a virtue here",
        ),
    ],
)
def test_what_only_looks_alike_is_not_counted(text: str) -> None:
    """Checksums fail, ranges are private or impossible, forms are too short."""
    findings = Findings()
    findings.add(talk(0, text))
    assert findings.to_json() == {}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit", ["a", "1", "a.", "a@", "eyJ", "eyJaaaaaaaaaaaa.", "+1 ", "1111 ", "GB82 ", "1.", "x-", "sk-", "-----BEGIN "]
)
def test_no_text_makes_the_search_slow(unit: str) -> None:
    """200,000 characters of what each pattern begins with; quadratic search would take far longer than the time limit."""
    findings = Findings()
    findings.add(talk(0, unit * (200_000 // len(unit))))
    findings.to_json()


def test_scripts_are_shares_of_letters() -> None:
    """Six Latin letters, two Han, two Cyrillic; digits, signs and emoji are no letters."""
    text = TextStatistics()
    text.add(Conversation("r", (Message("user", "abc 123 日本!"), Message("assistant", "Éßz да 😀")), "f"))
    assert text.to_json()["script_shares"] == {"Latin": 0.6, "Cyrillic": 0.2, "Han": 0.2}


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_lengths_add_up(lengths: list[int]) -> None:
    """Every row is in the one bin whose end is the least power of two not below its length."""
    text = TextStatistics()
    for number, length in enumerate(lengths):
        text.add(Conversation(str(number), (Message("user", "a" * (length - 1)), Message("assistant", "b")), "f"))
    found = text.to_json()["characters"]
    assert (found["total"], found["least"], found["most"]) == (sum(lengths), min(lengths), max(lengths))
    assert sum(count for _, count in found["histogram"]) == len(lengths)
    for end, count in found["histogram"]:
        assert count == sum(end // 2 < max(length, 1) <= end or (end == 1 and length <= 1) for length in lengths)


def test_the_report_says_what_cleaning_would_leave_out() -> None:
    rows = [talk(0, "a b c d e f g h"), talk(1, "a b c d e f g h"), talk(2, "A, b c d e f g h!"), talk(3, "other")]
    report = check_rows(rows, CleanConfig(), {"rows_seen": 5}).to_json()
    assert (report["rows_in"], report["rows_out"], report["ingested"]) == (4, 2, {"rows_seen": 5})
    assert report["left_out"] == {
        "exact_duplicate": {"rows": 1, "first_ids": ["r1"]},
        "near_duplicate": {"rows": 1, "first_ids": ["r2"]},
    }
