"""The VM of one launch: lent for as long as it takes, and deleted by who may."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from jobs import tpu_vm
from jobs.tpu_gcloud import call
from jobs.tpu_shown import say
from jobs.tpu_vm import Vm
from utils.errors import EnvironmentProblem

RUNS = "relay-tpu: runs "
# Of all chains: a stage holds its lock, see jobs/tpu_remote.py. By the shell, since no code need be there.
ASK = f"for lock in .relay/*/*.lock; do test ! -e $lock || flock -n $lock true || echo {RUNS}$lock; done"


@dataclass
class Lease:
    vm: Vm
    made: bool = False  # by this launch; else it was there before, perhaps for another launcher, whose stage runs on it
    begun: bool = False  # a stage of this launch has run on it, or was followed there

    def making(self) -> None:
        self.made = True


@contextlib.contextmanager
def lent(vm: Vm) -> Iterator[Lease]:
    """Delete the VM afterwards; not one that was there before, if a stage runs on it, or none of ours has."""
    tpu_vm.find(vm)  # who is not logged in is told here, when there is nothing to delete
    lease = Lease(vm)
    try:
        yield lease
    except BaseException:
        if vm.ours and not lease.made and not lease.begun:
            _keep(vm)
        else:
            with contextlib.suppress(EnvironmentProblem):  # the cause to tell is what ended the chain
                _release(vm)
        raise
    if vm.ours and not lease.made and _is_used(vm):
        _keep(vm)
    else:
        _release(vm)


def _is_used(vm: Vm) -> bool:
    """Whether a stage runs on a VM; on one that does not answer none does."""
    with contextlib.suppress(EnvironmentProblem):
        return RUNS in call(vm.ssh(ASK))
    return False


def _keep(vm: Vm) -> None:
    with contextlib.suppress(EnvironmentProblem):
        if tpu_vm.find(vm) in {None, *tpu_vm.ENDED}:
            return
    whose = "it was there before, perhaps for another launcher; if not, it costs until it is deleted"
    say(f"{vm.name} is kept: {whose}: {shlex.join(vm.delete())}")


def _release(vm: Vm) -> None:
    if not vm.ours:
        return say(f"{vm.name} is kept: it was there before (tpu.name)")
    say(f"{vm.name}: deleting it")
    try:
        tpu_vm.delete(vm)
    except BaseException:
        with contextlib.suppress(OSError):
            print(f"{vm.name} may still be there, and cost: {shlex.join(vm.delete())}", file=sys.stderr, flush=True)
        raise
