"""A few hundred damaged archives; `python -m tests.fuzz_archive --cases 5000` reads more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.archives import NEEDS_TOOLS, make_lengths, pack
from tests.fuzz_archive import run
from utils import squashfs_index
from utils.errors import InputError

pytestmark = NEEDS_TOOLS


def test_what_is_read_is_right_or_an_input_error() -> None:
    outcomes, wrong = run(300)
    assert not wrong
    assert sum(outcomes.values()) == 300 and outcomes["refused"] > 100 and outcomes["read"] > 40


def test_more_names_or_blocks_than_memory_is_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(make_lengths(tmp_path / "source", 4096), tmp_path / "a.sqsh", "-b", "4096", "-no-fragments")
    squashfs_index.build(archive)
    monkeypatch.setattr(squashfs_index, "MOST", 200)
    with pytest.raises(InputError, match=f"{archive}: .* more names or blocks than"):
        squashfs_index.build(archive)
