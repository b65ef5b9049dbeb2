"""TensorBoard's event files: the numbers of metrics.jsonl, and small pictures.

One file an attempt. Its first words say from which step on those of the attempts before do not count any more.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

JPEG_QUALITY = 80


class Events:
    """Appends to a file of its own in `folder`; every event is there when its method returns."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Args: first_step: what earlier files say of this step and later ones is done again."""
        from tensorboard.compat.proto import event_pb2, summary_pb2  # takes a moment, and --help needs none
        from tensorboard.plugins.image.metadata import create_summary_metadata
        from tensorboard.summary.writer.record_writer import RecordWriter
        from tensorboard.util.tensor_util import make_tensor_proto

        self._tensor, self._metadata = make_tensor_proto, partial(create_summary_metadata, None)
        self._event, self._summary, session = event_pb2.Event, summary_pb2.Summary, event_pb2.SessionLog
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"  # read in this order
        self._file, self._records = folder / name, RecordWriter
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=session(status=session.START))

    def scalars(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        """Each of `numbers` as `<kind>/<name>`."""
        values = [self._summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in numbers.items()]
        self._write(step=step, summary=self._summary(value=values))

    def picture(self, tag: str, picture: Image, about: str, step: int) -> None:
        """Args: about: what TensorBoard tells of it."""
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=JPEG_QUALITY)
        width, height = picture.size
        parts = [str(width).encode(), str(height).encode(), file.getvalue()]
        value = self._summary.Value(tag=tag, tensor=self._tensor(parts), metadata=self._metadata(about))
        self._write(step=step, summary=self._summary(value=[value]))

    def _write(self, **what: Any) -> None:
        with open(self._file, "ab") as file:
            self._records(file).write(self._event(wall_time=time.time(), **what).SerializeToString())
