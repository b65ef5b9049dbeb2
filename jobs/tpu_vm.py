"""One TPU VM: the gcloud commands about it as argument lists, and what follows from its state."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobs.stages import Chain
from jobs.tpu_config import Tpu
from jobs.tpu_gcloud import POLL, Missing, Unreachable, call, patiently
from jobs.tpu_shown import say
from utils.errors import EnvironmentProblem, InputError

TELL = 20  # so many questions about a VM that is not ready are one line, unless the state changes
HOURS = 6  # to wait for a VM: in Google's queue, or until its zone has room
KEEPALIVE = ("ServerAliveInterval=30", "ServerAliveCountMax=10")  # else a dead connection looks like a silent stage
REMOVED = "REMOVED"  # not Google's word: a request that is ACTIVE, and its VM is not there
# Such a VM never becomes READY again (a stopped one not by itself); those of the last line are a queued request's.
ENDED = {"PREEMPTED", "TERMINATED", "STOPPED", "HIDDEN"} | {"FAILED", "SUSPENDED", REMOVED}
FULL = r"no more capacity|not enough resources|insufficient capacity|RESOURCE_EXHAUSTED"


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
        flags = [f"--ssh-flag=-o{option}" for option in KEEPALIVE]
        return self._gcloud("tpu-vm", "ssh", self.name, "--worker=all", *flags, f"--command={command}")


def find(vm: Vm) -> str | None:
    """The VM's state, READY or another of Google's words, or that of the request for it; None if there is neither."""
    here, *request = vm.describe()
    state = _state(here)
    if state is None and request:
        state = _state(request[0])
        if state == "ACTIVE":
            time.sleep(POLL)  # the VM may have come between the two questions
            state = _state(here) or REMOVED
    return state


def _state(question: list[str]) -> str | None:
    try:
        return call(question)
    except Missing:
        return None


def ensure(vm: Vm, making: Callable[[], None]) -> None:
    """Return once the VM is READY: as it is there, or created, in place of one that was taken away.

    Args:
        making: called before it is created.

    Raises: EnvironmentProblem when it is not in HOURS; for a VM that is not ours also when it is not there to wait for.
    """
    end, polls, told = time.monotonic() + HOURS * 3600, 0, ""
    while (state := patiently(lambda: find(vm))) != "READY":
        why = state or "requested"
        if time.monotonic() > end:
            raise EnvironmentProblem(f"{vm.name}: not READY in {HOURS} h ({why}); the same command goes on waiting")
        if not vm.ours and state is None:
            raise InputError(f"tpu.name={vm.name}: no such TPU VM in {vm.tpu.zone}")
        if not vm.ours and state in ENDED:
            raise EnvironmentProblem(f"{vm.name} is {state}; it is not the launcher's to replace (tpu.name): do so")
        if state in ENDED:
            say(f"{vm.name} is {state}: deleting it")
            delete(vm)
            continue
        if state is None:
            say(f"{vm.name}: asking for a {vm.tpu.accelerator} in {vm.tpu.zone}")
            making()
            try:
                call(vm.create())
                continue
            except Unreachable:
                why = "Google cannot be reached"
            except EnvironmentProblem as error:
                if not re.search(FULL, str(error), re.IGNORECASE) or "quota" in str(error).lower():
                    raise
                why = f"{vm.tpu.zone} has no room"
        if why != told or polls % TELL == 0:
            say(f"{vm.name}: waiting, {why}")
        polls, told = polls + 1, why
        time.sleep(POLL)


def delete(vm: Vm) -> None:
    """Delete the VM, if it is there. Raises: EnvironmentProblem when that fails again and again."""
    patiently(lambda: _delete(vm))  # one that is still being created may refuse


def _delete(vm: Vm) -> None:
    with contextlib.suppress(Missing):
        call(vm.delete())
