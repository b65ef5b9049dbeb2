"""What a chain file says about places elsewhere: `store:`, and `tpu:` for --cluster tpu."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils import config

BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/[^/]+)*")
VM_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Tpu:
    """The VM of --cluster tpu, in the words of `gcloud compute tpus`."""

    project: str | None = None  # default: gcloud's own
    zone: str | None = None
    accelerator: str | None = None  # type and size, such as v4-8
    version: str | None = None  # of the runtime software, such as tpu-ubuntu2204-base
    spot: bool = False  # cheaper, and taken away at any time; the chain goes on with the next one
    queued: bool = False  # wait in Google's queue for it, as a queued resource
    name: str | None = None  # a VM that is there: used, never created and never deleted


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    store: str | None = None  # where run directories are mirrored: objects under <store>/<chain>/<stage>/
    tpu: Tpu


KEYS = [key for key, _ in config.leaves(Elsewhere)]


def read(origin: str, values: Mapping[str, Any]) -> Elsewhere:
    """The sections of a chain file from their dotted keys. Raises: InputError listing every problem."""
    return config.build(Elsewhere, [(origin, dict(values))])


def missing(store: str | None, tpu: Tpu | None) -> list[str]:
    """What --cluster tpu still has to be told."""
    found = []
    if store is None:
        found.append("store: required for --cluster tpu, such as gs://my-bucket/relay; or give --store URL")
    elif not BUCKET.fullmatch(store):
        found.append(f"store={store}: for --cluster tpu a bucket, gs://my-bucket or gs://my-bucket/folder")
    if tpu is None:
        return [*found, "tpu: this section is required for --cluster tpu; jobs/tpu.yaml is an example"]
    if tpu.name is not None and not VM_NAME.fullmatch(tpu.name):
        found.append(f"tpu.name={tpu.name}: a TPU VM's name is of a-z 0-9 -, a letter first")
    needed = {"zone": "us-central2-b"}
    if tpu.name is None:
        needed |= {"accelerator": "v4-8", "version": "tpu-ubuntu2204-base"}
    for key, example in needed.items():
        if getattr(tpu, key) is None:
            found.append(f"tpu.{key}: required for --cluster tpu, such as {example}")
    return found
