"""What stands for the content of an object of a store, without reading it where the store tells a checksum."""

import hashlib
from typing import Any

from fsspec import AbstractFileSystem

CHECKSUMS = ("ETag", "etag", "md5Hash", "md5", "sha256", "blob_id", "crc32c")
"""Where stores keep a checksum of the content in a listing: S3, GCS, Azure, the Hub, HTTP."""
_READ_BYTES = 4 << 20


def content_stamp(filesystem: AbstractFileSystem, info: dict[str, Any]) -> str:
    """The store's checksum of an object; of one that has none the sha256 of all its bytes, which are read for it.

    A size, a time or samples would not do: an object replaced in place may be alike in all of them.

    Args:
        info: the object's entry in a listing.
    """
    checksum = next((str(info[key]) for key in CHECKSUMS if info.get(key)), None)
    if checksum is not None:
        return checksum
    with filesystem.open(info["name"], "rb", block_size=_READ_BYTES, cache_type="readahead") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
