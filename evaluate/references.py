"""Numbers to compare with: published ones by name, or those of another evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from utils import typed_yaml
from utils.coco_names import METRICS
from utils.errors import InputError

FILE = Path(__file__).parent / "references.yaml"


def load(reference: str) -> dict[str, float]:
    """The twelve COCO numbers by name of a name in references.yaml, or of a metrics.json.

    Raises: InputError for an unknown name, a missing file, or one without all twelve.
    """
    published = typed_yaml.read(FILE)
    if reference in published:
        return published[reference]
    try:
        stats = json.loads(Path(reference).read_bytes())["stats"]
        return {name: float(stats[name]) for name in METRICS}
    except OSError as error:
        known = ", ".join(published)
        raise InputError(f"reference {reference}: {error.strerror}; give a metrics.json, or one of {known}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"reference {reference}: not the metrics.json of an evaluation") from None
