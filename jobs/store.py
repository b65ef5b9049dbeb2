"""The bucket that keeps a chain's run directories too, if it has one."""

from __future__ import annotations

from pathlib import Path

from jobs.stages import Chain
from utils import mirror_views, paths


def refresh(chain: Chain) -> None:
    """Bring the markers here that the chain's store has, if it has one. Raises: EnvironmentProblem."""
    if chain.store:
        mirror_views.pull_markers(chain.url(), chain.dir.path)


def set_aside(chain: Chain, stage: str) -> Path:
    """Keep what was done before beside it, here and in the chain's store; returns where, here."""
    if chain.store:
        mirror_views.begin_anew(chain.url(stage))
    return paths.set_aside(chain.run_dir(stage).path)
