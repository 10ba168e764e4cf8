"""Which samples a step was made of, in few characters of its line in metrics.jsonl, and back.

    {"numbered": {"data/rows.jsonl:": "118,2+4,40"}, "named": ["a3f0", "intro"]}

Ids that differ in the number at their end alone, such as a row's place, are numbers in growing order: each is how far it is
from the one before, the first from 0, and +k stands for the k numbers that follow it. Those above are rows 118, 120, 121, 122,
123, 124 and 164. All others stand as they are. The order of a step's samples isn't kept: it differs with the number of ranks.
"""

import re
from collections.abc import Iterable, Iterator

from lib.core.manifest import Json

_NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,17})\Z")
"""At the end of an id; leading zeros belong to what comes before it."""


def compact_ids(sample_ids: Iterable[str]) -> Json:
    """The same for the same ids in any order; an id that is there twice stays so."""
    numbers: dict[str, list[int]] = {}
    named = []
    for sample_id in sample_ids:
        if found := _NUMBER.search(sample_id):
            numbers.setdefault(sample_id[: found.start()], []).append(int(found.group()))
        else:
            named.append(sample_id)
    numbered = {}
    for prefix, values in numbers.items():
        if len(values) > 1:
            numbered[prefix] = ",".join(_gaps(sorted(values)))
        else:
            named.append(f"{prefix}{values[0]}")
    return {"numbered": numbered, "named": sorted(named)}


def expand_ids(samples: Json) -> list[str]:
    """The ids, sorted by name; those that differ in a number alone, by that."""
    ids = [(sample_id, 0, sample_id) for sample_id in samples["named"]]
    for prefix, text in samples["numbered"].items():
        ids += [(prefix, number, f"{prefix}{number}") for number in _numbers(text)]
    return [sample_id for _, _, sample_id in sorted(ids)]


def _gaps(values: list[int]) -> Iterator[str]:
    before, start = 0, 0
    while start < len(values):
        stop = start + 1
        while stop < len(values) and values[stop] == values[stop - 1] + 1:
            stop += 1
        more = f"+{stop - start - 1}" if stop > start + 1 else ""
        yield f"{values[start] - before}{more}"
        before, start = values[stop - 1], stop


def _numbers(text: str) -> Iterator[int]:
    number = 0
    for part in text.split(","):
        gap, _, more = part.partition("+")
        number += int(gap)
        yield number
        for _ in range(int(more or 0)):
            number += 1
            yield number
