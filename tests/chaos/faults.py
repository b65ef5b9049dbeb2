"""The faults, one small function each, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from signal import SIGKILL, SIGSTOP

from tests.chaos import launching, processes, storage
from tests.chaos.place import FILE, restart_slurmctld, wait
from tests.chaos.scene import LaterError, Scene, WrongError
from tests.cluster import NODES


def rank_killed(scene: Scene) -> None:
    scene.hit(processes.ranks, SIGKILL)


def rank_stopped(scene: Scene) -> None:
    scene.hit(processes.ranks, SIGSTOP)


def worker_killed(scene: Scene) -> None:
    scene.hit(processes.workers, SIGKILL)


def worker_stopped(scene: Scene) -> None:
    scene.hit(processes.workers, SIGSTOP)


def srun_killed(scene: Scene) -> None:
    scene.hit(processes.srun, SIGKILL)


def batch_shell_killed(scene: Scene) -> None:
    scene.hit(processes.batch_shell, SIGKILL)


def all_processes_killed(scene: Scene) -> None:
    found = scene.processes()
    if not processes.ranks(found):
        raise LaterError("no ranks")
    for process in found:
        process.send(SIGKILL)


def killed_in_a_save(scene: Scene) -> None:
    folder = scene.place.checkpoints(scene.job.stage)
    if not wait(lambda: list(folder.glob(".*.tmp")), 20, pause=0.002):
        raise LaterError("no save")
    scene.hit(processes.ranks, SIGKILL)


def usr2_to_the_step(scene: Scene) -> None:
    scene.slurm("scancel", "--signal=USR2")


def usr2_to_all(scene: Scene) -> None:
    scene.slurm("scancel", "--full", "--signal=USR2")


def term_to_the_step(scene: Scene) -> None:
    scene.slurm("scancel", "--signal=TERM")


def usr2_at_once(scene: Scene) -> None:
    """In the first second of a start."""
    scene.slurm("scontrol", "requeue")

    def starts() -> bool:
        now = scene.now()
        return now is not None and now.state == "RUNNING"

    scene.wait_until_over()
    scene.until(starts, "a start after a requeue")
    scene.slurm("scancel", scene.chance.choice(["--full", "--batch"]), "--signal=USR2")


def requeued(scene: Scene) -> None:
    scene.slurm("scontrol", "requeue")


def preempted(scene: Scene) -> None:
    """By a job of a partition that goes before."""
    cluster = scene.place.cluster
    cluster.run("scontrol", "create", "PartitionName=before", f"Nodes={','.join(NODES)}", "PriorityTier=10")
    words = ["--partition=before", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.wait(cluster.sbatch(*words), timeout=60)
    cluster.run("scontrol", "delete", "PartitionName=before")


def slurmd_killed(scene: Scene) -> None:
    """A node is lost for slurmctld alone: the ranks there live on, until they find out that the run is another's."""
    lost(scene, lambda: None)


def node_lost(scene: Scene) -> None:
    """All of it is dead at once."""

    def kill_all() -> None:
        found = scene.processes()
        for pid in [*processes.step_daemons(found), *(process.pid for process in found)]:
            processes.send(pid, SIGKILL)

    lost(scene, kill_all)


def lost(scene: Scene, besides: Callable[[], None]) -> None:
    """slurmd is killed, and is back when the stage has begun elsewhere."""
    node, cluster = scene.job.node, scene.place.cluster
    attempts = {line.attempt for line in scene.place.lines()}
    cluster.kill(node)
    besides()

    def goes_on_elsewhere() -> bool:
        jobs = scene.place.jobs()
        return jobs == [] or any(line.attempt not in attempts for line in scene.place.lines())

    try:
        scene.until(goes_on_elsewhere, "a start elsewhere")
    finally:
        cluster.launch(node)


def slurmctld_killed(scene: Scene) -> None:
    scene.place.cluster.kill("slurmctld")
    restart_slurmctld(scene.place.cluster)


def second_attempt(scene: Scene) -> None:
    """The same stage by hand, while it runs."""
    attempt = scene.place.marker(scene.job.stage)
    command = ["-m", "jobs.worker", scene.job.stage, *FILE]
    done = scene.place.run(scene.place.environ["RELAY_PYTHON"], *command)
    after = scene.place.marker(scene.job.stage)
    if [attempt.get(key) for key in ("job_id", "restarts")] != [after.get(key) for key in ("job_id", "restarts")]:
        raise WrongError(f"the marker is of another attempt now: {after}")
    if attempt.get("status") == after.get("status") == "running":
        if done.returncode != 2 or "running already: job" not in done.stdout:
            raise WrongError(f"exit code {done.returncode}: {done.stdout}")
    else:
        raise LaterError("the stage has ended")


@dataclass(frozen=True)
class Fault:
    inject: Callable[[Scene], None]
    ends: bool = True  # the attempt; else it goes on
    needs_disk: bool = False
    anywhere: bool = False  # also where nothing is trained


FAULTS = {
    "rank killed": Fault(rank_killed, anywhere=True),
    "rank stopped": Fault(rank_stopped),
    "rank killed in a save": Fault(killed_in_a_save),
    "loader process killed": Fault(worker_killed),
    "loader process stopped": Fault(worker_stopped),
    "all processes killed": Fault(all_processes_killed, anywhere=True),
    "srun killed": Fault(srun_killed, anywhere=True),
    "batch shell killed": Fault(batch_shell_killed, anywhere=True),
    "USR2 to the step": Fault(usr2_to_the_step),
    "USR2 to step and shell": Fault(usr2_to_all),
    "TERM to the step": Fault(term_to_the_step),
    "USR2 at the start": Fault(usr2_at_once),
    "requeued": Fault(requeued, anywhere=True),
    "preempted": Fault(preempted, anywhere=True),
    "slurmd killed": Fault(slurmd_killed),
    "node lost": Fault(node_lost),
    "slurmctld killed": Fault(slurmctld_killed, ends=False),
    "launcher killed": Fault(launching.killed),
    "two launchers": Fault(launching.twice),
    "slurmctld down at launch": Fault(launching.without_slurmctld),
    "checkpoint truncated": Fault(storage.truncated),
    "checkpoint zeroed": Fault(storage.zeroed),
    "checkpoint bit flipped": Fault(storage.bit_flipped),
    "disk full": Fault(storage.disk_full, needs_disk=True),
    "disk read-only": Fault(storage.disk_read_only, needs_disk=True),
    "second attempt": Fault(second_attempt, ends=False),
}
