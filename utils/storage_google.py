"""Google Cloud Storage by gcsfs: opened, asked, and what its errors mean to a user."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from utils.errors import EnvironmentProblem, InputError, RelayError

SCHEMES = ("gs", "gcs")
CONNECT, SILENT, WHOLE = 10.0, 20.0, 60.0  # seconds a request may take to connect, without a byte, and in all
OBJECT = "size,generation,crc32c"  # what is asked about an object
USUAL_MEANS = (
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file, or give the "
    "machine's service account the right to it (roles/storage.objectViewer to read, objectAdmin to write)"
)


def opened() -> Any:
    """A file system. Raises: EnvironmentProblem if gcsfs is not installed."""
    # Else gcsfs asks a gRPC service what kind each bucket is; where nothing answers, that takes a minute a call.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import aiohttp
        from gcsfs.core import GCSFileSystem  # type: ignore[import-untyped]
    except ImportError as error:
        raise EnvironmentProblem(f"gs:// needs gcsfs ({error}); pip install -e .[gcs]") from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of each error that it raises
    emulated = "STORAGE_EMULATOR_HOST" in os.environ
    return GCSFileSystem(
        token="anon" if emulated else "google_default",
        requests_timeout=aiohttp.ClientTimeout(total=WHOLE, sock_connect=CONNECT, sock_read=SILENT),
        session_kwargs={"trust_env": not emulated},  # the site's proxy, as google-auth has it anyway
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def about(url: str, system: Any, _: str) -> dict[str, Any]:
    """What is known of an object. By one request, of gcsfs's two one is a listing."""
    return system.call("GET", "b/{}/o/{}", *split(url), json_out=True, fields=OBJECT)


def page(prefix: str, token: str | None, system: Any, _: str) -> dict[str, Any]:
    """Some of what is below a prefix, and the token of the next page."""
    bucket, start = split(prefix)
    how = {"prefix": start or None, "pageToken": token, "fields": f"nextPageToken,items(name,{OBJECT})"}
    return system.call("GET", "b/{}/o", bucket, json_out=True, maxResults=1000, **how)


def split(url: str) -> tuple[str, str]:
    """Bucket, and name in it."""
    bucket, _, name = url.partition("://")[2].partition("/")
    return bucket, name


def crc32c(pieces: Iterable[bytes], value: int = 0) -> int:
    """The checksum of all pieces together, and of what `value` is that of before them."""
    import google_crc32c  # with gcsfs

    for piece in pieces:
        value = google_crc32c.extend(value, piece)
    return value


def explained(url: str, error: BaseException) -> RelayError | None:
    """The error of ours that an error of gcsfs is; None for one of something else."""
    import aiohttp
    import requests
    from gcsfs.retry import HttpError, NonRetryableError  # type: ignore[import-untyped]
    from google.auth.exceptions import GoogleAuthError

    code = int(error.code or 0) if isinstance(error, HttpError) else None
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        code = 403
    if code in (401, 403):
        return EnvironmentProblem(f"{url}: no access with these credentials (HTTP {code}); {USUAL_MEANS}")
    if isinstance(error, (GoogleAuthError, NonRetryableError)):
        return EnvironmentProblem(f"{url}: no usable Google credentials ({type(error).__name__}); {USUAL_MEANS}")
    if isinstance(error, ValueError) and str(error).startswith("Bad Request"):
        code = 400
    if isinstance(error, requests.exceptions.ProxyError):
        code = 502
    if code and code < 500 and code not in (408, 429):
        return InputError(f"{url}: the storage refuses the request (HTTP {code}); check the bucket and the name")
    if code:
        return EnvironmentProblem(f"{url}: the storage fails (HTTP {code}), also after several tries; try again later")
    if isinstance(error, aiohttp.ClientPayloadError):
        return EnvironmentProblem(f"{url}: the answer is cut short, also after several tries; try again later")
    if isinstance(error, (aiohttp.ClientError, requests.exceptions.RequestException, ConnectionError)):
        kind = type(error).__name__
        return EnvironmentProblem(
            f"{url}: no connection to the storage ({kind}), also after several tries; check the network"
        )
    return None
