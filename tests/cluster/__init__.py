"""A throw-away Slurm cluster of real daemons on one machine: two nodes, four fake GPUs each.

munged, mariadbd, slurmdbd, slurmctld and a slurmd per node, configured by conf/, without root and systemd.
Everything is in one directory, on random ports, the caller's alone. By hand: `python -m tests.cluster up`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.cluster.machine import MARK, PATH, available, free_ports, processes
from utils.errors import EnvironmentProblem, InputError

CONF = Path(__file__).parent / "conf"
NODES = ("n1", "n2")
GPUS = 4  # a node
FINAL = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

# How each daemon is started, what is asked until it answers, and the answer. {d} is the directory.
DAEMONS = {
    "munged": (
        "munged -F --force --socket={d}/munge.sock --key-file={d}/munge.key --pid-file={d}/munged.pid "
        "--seed-file={d}/munge.seed",
        "munge -n --socket={d}/munge.sock",
        "MUNGE",
    ),
    "mariadbd": (
        "mariadbd --defaults-file={d}/my.cnf",
        "mariadb-admin --no-defaults --socket={d}/mariadb.sock ping",
        "alive",
    ),
    "slurmdbd": ("slurmdbd -D", "sacctmgr show cluster", "Cluster"),
    "slurmctld": ("slurmctld -D -f {d}/slurm.conf", "scontrol ping", "is UP"),
}
DAEMONS |= {
    node: (
        f"slurmd -D -N {node} -f {{d}}/slurm.conf",
        f"sinfo -hN -n {node} -o %T",
        r"^(idle|mixed|allocated)$",  # with a star behind it the node does not answer
    )
    for node in NODES
}

__all__ = ["Cluster", "available"]


class Cluster:
    """A cluster in `directory`: running after `start`, or found again there to `stop` it.

    `env` is what a client needs in its environment: `os.environ | cluster.env`.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).resolve()
        self.env = {"SLURM_CONF": f"{self.directory}/slurm.conf"}
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    @classmethod
    def start(cls, directory: Path | str, accounting: bool = True, min_job_age: int = 3600) -> Cluster:
        """Start every daemon in a new or empty `directory`; back when both nodes answer.

        Without `accounting` there is no slurmdbd and sacct fails. slurmctld forgets a finished job after
        `min_job_age` seconds. Raises InputError for a directory that will not do, EnvironmentProblem with the
        end of its log for a daemon that does not start; then nothing of the cluster is left.
        """
        if reason := available():
            raise EnvironmentProblem(reason)
        cluster = cls(directory)
        d = cluster.directory
        if d.exists() and any(d.iterdir()):
            raise InputError(f"{d} is not empty; to end a cluster there: python -m tests.cluster down")
        if len(str(d)) > 90 or re.search(r"\s", str(d)):
            raise InputError(f"{d}: has a space, or more than 90 characters (a socket's path ends at 107)")
        d.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            cluster._configure(accounting, min_job_age)
            cluster.launch("munged")
            if accounting:
                cluster._check("mariadb-install-db", f"--defaults-file={d}/my.cnf", "--skip-test-db")
                cluster.launch("mariadbd")
                cluster.launch("slurmdbd")
                cluster._check("sacctmgr", "-i", "add", "cluster", "relay")  # before slurmctld registers
            for daemon in ("slurmctld", *NODES):
                cluster.launch(daemon)
        except BaseException:  # Ctrl-C as well
            cluster.stop()
            raise
        return cluster

    def _configure(self, accounting: bool, min_job_age: int) -> None:
        """Write conf/ with this cluster's values, the munge key and the fake GPUs."""
        d = self.directory
        values = {
            **free_ports("mariadbd", "slurmdbd", "slurmctld", *NODES),
            "d": d,
            "host": socket.gethostname().split(".")[0],
            "gpus": GPUS,
            "last_gpu": GPUS - 1,
            "user": pwd.getpwuid(os.geteuid()).pw_name,
            "min_job_age": min_job_age,
            "password": secrets.token_hex(16),
        }
        files = {path.name: path.read_text().format(**values) for path in CONF.iterdir()}
        with_accounting = files.pop("slurm-accounting.conf")
        files["slurm.conf"] += with_accounting if accounting else ""
        for name, text in {**files, "munge.key": secrets.token_hex(64)}.items():
            (d / name).touch(mode=0o600)  # slurmdbd and munged refuse anything wider
            (d / name).write_text(text)
        for gpu in range(GPUS):
            (d / f"gpu{gpu}").symlink_to("/dev/null")
        (d / "state").mkdir()

    def launch(self, daemon: str) -> None:
        """Start one of DAEMONS (again, after `kill`) and wait until it answers."""
        start, probe, answer = (text.format(d=self.directory) for text in DAEMONS[daemon])
        log = self.directory / f"{daemon}.log"
        with log.open("ab") as out:
            self.children[daemon] = subprocess.Popen(
                start.split(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self.directory,
                env={"PATH": PATH, **self.env, MARK: "1"},
                start_new_session=True,  # a terminal's Ctrl-C is not for the daemons
            )
        end = time.monotonic() + 60
        while not re.search(answer, self.run(*probe.split()).stdout):
            if self.children[daemon].poll() is not None or time.monotonic() > end:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise EnvironmentProblem(f"{daemon} does not start; the end of its log:\n{tail}")
            time.sleep(0.05)

    def kill(self, daemon: str) -> None:
        """kill -9 a daemon that this process started; the jobs on a killed node live on."""
        self.children[daemon].kill()
        self.children.pop(daemon).wait()

    def run(self, *argv: str, timeout: float = 60, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a client command on this cluster, not on one whose job this may be."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        env |= self.env | {"PATH": PATH}
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)

    def _check(self, *argv: str, cwd: Path | None = None) -> str:
        done = self.run(*argv, cwd=cwd)
        if done.returncode:
            raise EnvironmentProblem(f"{argv[0]} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
        return done.stdout

    def sbatch(self, *args: str, cwd: Path | None = None) -> str:
        """Submit a job; its id. Raises EnvironmentProblem with what sbatch said against it."""
        return self._check("sbatch", "--parsable", *args, cwd=cwd).strip()

    def wait(self, job_id: str | int, timeout: float = 120) -> str:
        """The state in which a job ended, as Slurm spells it. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while True:
            shown = self.run("scontrol", "-o", "show", "job", str(job_id)).stdout
            if not shown:  # slurmctld has forgotten it, or does not answer
                shown = self.run("sacct", "-nPX", "-j", str(job_id), "-o", "State").stdout
            if (found := re.search(r"(?:JobState=|\A)([A-Z_]+)\b", shown)) and found[1] in FINAL:
                return found[1]
            if time.monotonic() > end:
                raise TimeoutError(f"job {job_id} has not ended in {timeout} s: {shown or 'unknown'}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Kill every daemon, step and job of this cluster and remove its directory; again does no harm.

        Raises EnvironmentProblem with the pids that are still there after 30 s.
        """
        end, quiet = time.monotonic() + 30, 0
        while quiet < 2:  # while it starts a program a process shows no environment for a moment: look twice
            pids = processes(self.env["SLURM_CONF"])
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                raise EnvironmentProblem(f"processes of {self.directory} that do not die: {pids}")
            quiet = 0 if pids else quiet + 1
            time.sleep(0.05)
        for child in self.children.values():
            child.wait()
        if self.directory.exists():
            shutil.rmtree(self.directory)
