"""A local S3 server and the environment that leads clients to it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import s3fs
from moto.moto_server.threaded_moto_server import ThreadedMotoServer


@contextmanager
def s3_server(bucket: str) -> Iterator[s3fs.S3FileSystem]:
    """Runs moto's server with one bucket; within the block any S3 client of this process talks to it.

    moto keeps what it stores for the whole process, so the bucket is removed at the end.
    """
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            store = s3fs.S3FileSystem()
            store.mkdir(bucket)
            yield store
            store.rm(bucket, recursive=True)
        finally:
            server.stop()
            s3fs.S3FileSystem.clear_instance_cache()
