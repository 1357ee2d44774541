"""S3 as moto emulates it, for what reads the environment to find it."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from server.adapters.remote import buckets

BUCKET = "adapters"


@contextlib.contextmanager
def s3_service() -> Iterator[Any]:
    """A client of an S3 server with one empty bucket, which this process finds while the block runs."""
    service = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with contextlib.redirect_stderr(io.StringIO()), pytest.MonkeyPatch.context() as environment:
        service.start()
        host, port = service.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        buckets.system_of.cache_clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield client
        client.close()
        buckets.system_of.cache_clear()
        service.stop()
