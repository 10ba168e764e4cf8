"""A disk that fails to read a folder: tried again, since it may pass; told apart from a folder that is damaged."""

import errno
import logging
import time

from lib.train.shelf import Shelf

DISK_ERRNOS = frozenset({errno.EIO, errno.EREMOTEIO, errno.EBADMSG, errno.EUCLEAN})
"""What a file system says that can't get at a block, or finds that its own checksum of one is wrong."""
PAUSES_SECONDS = (1.0, 10.0)
"""Between the tries, which are one more."""
_LOGGER = logging.getLogger(__name__)


def failed_to_read(error: OSError) -> bool:
    """The disk is to blame, not the folder's absence or our rights."""
    return error.errno in DISK_ERRNOS


def verify_patiently(shelf: Shelf, name: str, kind: str) -> None:
    """`shelf.verify`, tried again where the disk fails.

    Raises:
        OSError: it failed each time; see `failed_to_read`.
    """
    for pause in PAUSES_SECONDS:
        try:
            shelf.verify(name, kind)
        except OSError as error:
            if not failed_to_read(error):
                raise
            _LOGGER.warning("%s/%s can't be read, trying again in %g s: %s", shelf, name, pause, error)
            time.sleep(pause)
        else:
            return
    shelf.verify(name, kind)
