"""One TPU VM: the gcloud commands about it as argument lists, and what follows from its state."""

from __future__ import annotations

import hashlib
import re
import subprocess
import time
from dataclasses import dataclass

from jobs.stages import Chain
from jobs.tpu_config import Tpu
from utils.errors import EnvironmentProblem, InputError

POLL = 30.0  # seconds between two questions about a VM that is not ready
TELL = 20  # so many of them are one line, unless the state changes
HOURS = 6  # to wait for a VM: in Google's queue, or until its zone has room
LONGEST = 3600  # seconds one gcloud command may take; creating a large slice is slow
DELETIONS = 5  # tries: a VM that is still being created may refuse the first
# Such a VM never becomes READY again (a stopped one not by itself); those of the last line are a queued request's.
ENDED = {"PREEMPTED", "TERMINATED", "STOPPED", "HIDDEN"} | {"FAILED", "SUSPENDED"}
FULL = r"no more capacity|not enough resources|insufficient capacity|RESOURCE_EXHAUSTED"
LOGIN = r"auth login|auth tokens|UNAUTHENTICATED|Reauthentication"


class Missing(EnvironmentProblem):
    """gcloud knows nothing of that name."""


def identity(chain: Chain) -> str:
    """A name for all that belongs to this chain in this store: the same on every machine, another for others'."""
    slug = re.sub("[^a-z0-9]+", "-", chain.name.lower())[:40].strip("-")
    return f"relay-{slug}-{hashlib.sha256(chain.url().encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Vm:
    """A TPU VM, or the one host after the other of a slice."""

    name: str
    tpu: Tpu

    @classmethod
    def of(cls, chain: Chain) -> Vm:
        assert chain.tpu  # jobs/tpu.py has checked it
        return cls(chain.tpu.name or identity(chain), chain.tpu)

    @property
    def ours(self) -> bool:
        """Whether the launcher makes and deletes it."""
        return self.tpu.name is None

    def _gcloud(self, group: str, verb: str, *words: str) -> list[str]:
        project = [f"--project={self.tpu.project}"] if self.tpu.project else []
        return ["gcloud", "compute", "tpus", group, verb, *words, f"--zone={self.tpu.zone}", *project, "--quiet"]

    def describe(self) -> list[list[str]]:
        """What its state is, and if there is no VM yet, that of the request for it."""
        asked = [self._gcloud("tpu-vm", "describe", self.name, "--format=value(state)")]
        if self.tpu.queued and self.ours:
            asked.append(self._gcloud("queued-resources", "describe", self.name, "--format=value(state.state)"))
        return asked

    def create(self) -> list[str]:
        what = [f"--accelerator-type={self.tpu.accelerator}"]
        spot = ["--spot"] if self.tpu.spot else []
        if not self.tpu.queued:
            return self._gcloud("tpu-vm", "create", self.name, *what, f"--version={self.tpu.version}", *spot)
        # A request that nobody waits for any more must not become a VM that nobody deletes.
        what += [f"--node-id={self.name}", f"--runtime-version={self.tpu.version}", f"--valid-until-duration={HOURS}h"]
        return self._gcloud("queued-resources", "create", self.name, *what, *spot)

    def delete(self) -> list[str]:
        if self.tpu.queued:  # --force: with the VM that came of it
            return self._gcloud("queued-resources", "delete", self.name, "--force")
        return self._gcloud("tpu-vm", "delete", self.name)

    def scp(self, file: str, place: str) -> list[str]:
        return self._gcloud("tpu-vm", "scp", file, f"{self.name}:{place}", "--worker=all")

    def ssh(self, command: str) -> list[str]:
        """Run one string by the shell of each host, in the home directory."""
        return self._gcloud("tpu-vm", "ssh", self.name, "--worker=all", f"--command={command}")


def call(argv: list[str]) -> str:
    """The output of a gcloud command. Raises: Missing, EnvironmentProblem, in its words."""
    what = " ".join(argv[3:6])
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=LONGEST,
            start_new_session=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise EnvironmentProblem("gcloud: no such program; install the Google Cloud CLI, then `gcloud init`") from None
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(f"gcloud {what}: no answer in {LONGEST} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if "NOT_FOUND" in said:
            raise Missing(said)
        if re.search(LOGIN, said):
            raise EnvironmentProblem(f"gcloud is not logged in: run `gcloud auth login`, then the same again ({said})")
        raise EnvironmentProblem(f"gcloud {what}: {said}")
    return done.stdout.strip()


def find(vm: Vm) -> str | None:
    """The VM's state, READY or another of Google's words, or that of the request for it; None if there is neither."""
    for question in vm.describe():
        try:
            return call(question)
        except Missing:
            pass
    return None


def ensure(vm: Vm) -> None:
    """Return once the VM is READY: as it is there, or created, in place of one that was taken away.

    Raises: EnvironmentProblem when it is not in HOURS; for a VM that is not ours also when it is not there to wait for.
    """
    end, polls, told = time.monotonic() + HOURS * 3600, 0, ""
    while (state := find(vm)) != "READY":
        why = state or "requested"
        if time.monotonic() > end:
            raise EnvironmentProblem(f"{vm.name}: not READY in {HOURS} h ({why}); the same command goes on waiting")
        if not vm.ours and state is None:
            raise InputError(f"tpu.name={vm.name}: no such TPU VM in {vm.tpu.zone}")
        if not vm.ours and state in ENDED:
            raise EnvironmentProblem(f"{vm.name} is {state}; it is not the launcher's to replace (tpu.name): do so")
        if state in ENDED:
            print(f"{vm.name} is {state}: deleting it", flush=True)
            delete(vm)
            continue
        if state is None:
            print(f"{vm.name}: asking for a {vm.tpu.accelerator} in {vm.tpu.zone}", flush=True)
            try:
                call(vm.create())
                continue
            except EnvironmentProblem as error:
                if not re.search(FULL, str(error), re.IGNORECASE) or "quota" in str(error).lower():
                    raise
                why = f"{vm.tpu.zone} has no room"
        if why != told or polls % TELL == 0:
            print(f"{vm.name}: waiting, {why}", flush=True)
        polls, told = polls + 1, why
        time.sleep(POLL)


def delete(vm: Vm) -> None:
    """Delete the VM, if it is there. Raises: EnvironmentProblem when that fails again and again."""
    for left in reversed(range(DELETIONS)):
        try:
            call(vm.delete())
            return
        except Missing:
            return
        except EnvironmentProblem:
            if not left:
                raise
            time.sleep(POLL)
