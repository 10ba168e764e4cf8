"""Laws of content stamps: equal content, equal stamp; a byte anywhere, another."""

from fsspec.implementations.memory import MemoryFileSystem

from lib.core.stamps import content_stamp


def test_a_byte_anywhere_changes_the_stamp_where_a_store_tells_no_checksum() -> None:
    """[I9] The object is longer than several reads; the byte is at its beginning, in its middle, at its end."""
    store, content = MemoryFileSystem(), bytes(range(256)) * (40 << 10)
    stamps = set()
    for place in (None, 0, len(content) // 2, len(content) - 1):
        altered = bytearray(content)
        if place is not None:
            altered[place] ^= 1
        store.pipe("/stamps/object", bytes(altered))
        stamps.add(content_stamp(store, store.info("/stamps/object")))
    assert len(stamps) == 4
    store.pipe("/stamps/copy", content)
    assert content_stamp(store, store.info("/stamps/copy")) in stamps


def test_a_stores_own_checksum_is_taken_without_reading() -> None:
    """No object of that name exists: reading it would fail."""
    assert content_stamp(MemoryFileSystem(), {"name": "/stamps/none", "ETag": '"abc"'}) == '"abc"'
