"""What several tests need: real Slurm clusters, shared real data, and the reason for a skip."""

from __future__ import annotations

import atexit
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, available
from utils import log, timeline

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LONG = ("test_demo", "test_readme", "test_chaos", "test_resume", "test_lost", "test_exit_codes")  # minutes each
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: what tests start must hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)  # begun first, they do not keep the others waiting
    no_slurm = available()
    for item in items:
        if no_slurm and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason=f"needs Slurm: {no_slurm}"))
        if not SHARED_DATA.is_dir() and item.get_closest_marker("realdata"):
            item.add_marker(pytest.mark.skip(reason=f"needs the shared real data in {SHARED_DATA}"))


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A program that a test has run in this process logs no more into its directory, which goes with the test."""
    yield
    for handler in list(log.logger.handlers):
        log.logger.removeHandler(handler)
        handler.close()


@pytest.fixture(autouse=True)
def own_time() -> Iterator[None]:
    """What a test has done in this process is no part of the wall time of the next one's run."""
    yield
    timeline._timeline = timeline.Timeline(timeline.clock())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real archives; for tests marked `realdata`."""
    return SHARED_DATA


def _cluster(accounting: bool = True, min_job_age: int = 3600) -> Iterator[Cluster]:
    # Not pytest's tmp_path: its names can be too long for a socket, and it keeps what it holds.
    cluster = Cluster.start(tempfile.mkdtemp(prefix="relay-slurm-"), accounting, min_job_age)
    atexit.register(cluster.stop)  # also when pytest does not get to its finalizers
    yield cluster
    cluster.stop()
    atexit.unregister(cluster.stop)


@pytest.fixture
def nothing_stays_queued(request: pytest.FixtureRequest) -> Iterator[None]:
    """Afterwards the cluster of the test has no job."""
    yield
    for name in {"cluster", "cluster_without_accounting", "forgetful_cluster", "fragile_cluster"} & set(
        request.fixturenames
    ):
        cluster = request.getfixturevalue(name)
        if jobs := cluster.run("squeue", "-h", "-o", "%i").stdout.split():
            cluster.run("scancel", "--signal=KILL", *jobs)
            cluster.run("scancel", *jobs)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm with accounting that forgets no job; for tests marked `slurm`."""
    yield from _cluster()


@pytest.fixture(scope="session")
def cluster_without_accounting() -> Iterator[Cluster]:
    """A Slurm whose sacct fails."""
    yield from _cluster(accounting=False)


@pytest.fixture(scope="session")
def forgetful_cluster() -> Iterator[Cluster]:
    """A Slurm with accounting whose slurmctld forgets a finished job after seconds."""
    yield from _cluster(min_job_age=10)


@pytest.fixture(scope="module")
def fragile_cluster() -> Iterator[Cluster]:
    """A Slurm without accounting of a module's own, to kill its daemons."""
    yield from _cluster(accounting=False)
