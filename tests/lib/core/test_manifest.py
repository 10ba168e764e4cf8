"""Laws of the manifest: the digest is a function of content alone, and an altered manifest is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.core.errors import ArtifactCorruptError
from lib.core.manifest import FileEntry, Manifest, canonical_json, digest_of

NAMES = st.text(min_size=1, max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
MANIFESTS = st.builds(
    Manifest,
    kind=NAMES,
    files=st.lists(st.builds(FileEntry, path=NAMES, size_bytes=st.integers(0, 2**40), sha256=NAMES), max_size=3).map(tuple),
    counts=st.dictionaries(NAMES, st.integers(0, 2**40), max_size=3),
    meta=st.dictionaries(NAMES, JSON, max_size=3),
    lineage=st.dictionaries(NAMES, NAMES, max_size=3),
    versions=st.dictionaries(NAMES, NAMES, max_size=3),
    info=st.dictionaries(NAMES, JSON, max_size=3),
)


@given(MANIFESTS)
def test_a_manifest_survives_json(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json(), where="here") == manifest


@given(MANIFESTS, st.dictionaries(NAMES, NAMES, max_size=3), st.dictionaries(NAMES, JSON, max_size=3))
def test_lineage_and_timings_do_not_enter_the_digest(
    manifest: Manifest, lineage: dict[str, str], info: dict[str, object]
) -> None:
    """Making the same content again, from other runs and in another time, gives the same digest."""
    again = Manifest(manifest.kind, manifest.files, manifest.counts, manifest.meta, lineage, {"torch": "another"}, info)
    assert again.digest == manifest.digest


@given(MANIFESTS, st.sampled_from(["kind", "counts", "meta"]))
def test_content_enters_the_digest(manifest: Manifest, part: str) -> None:
    changed = {**vars(manifest), part: manifest.kind + "!" if part == "kind" else {**getattr(manifest, part), "new key": 1}}
    assert Manifest(**changed).digest != manifest.digest


@given(MANIFESTS)
def test_an_edited_manifest_is_refused(manifest: Manifest) -> None:
    raw = json.loads(manifest.to_json())
    raw["counts"]["rows nobody wrote"] = 1
    with pytest.raises(ArtifactCorruptError, match="altered after it was written"):
        Manifest.from_json(json.dumps(raw), where="here")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1, "digest": "x", "files": [{}]}', "null", '"x"']
)
def test_anything_but_a_manifest_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(ArtifactCorruptError, match=r"^some/manifest\.json: "):
        Manifest.from_json(text, where="some/manifest.json")


@given(st.dictionaries(NAMES, JSON, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_change_a_digest(value: dict[str, object], rng: object) -> None:
    """[I4] A permuted mapping is the same mapping."""
    items = list(value.items())
    rng.shuffle(items)  # type: ignore[attr-defined]
    assert digest_of(dict(items)) == digest_of(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_digest_of_a_number_json_cannot_hold(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"loss": number})
