"""The VM of one launch: lent for as long as it takes, and deleted by who may."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from jobs import tpu_vm
from jobs.tpu_shown import say
from jobs.tpu_vm import Vm
from utils.errors import EnvironmentProblem


@dataclass
class Lease:
    vm: Vm
    theirs: bool  # it was there before: perhaps another launcher's, whose stage runs on it
    begun: bool = False  # a stage of this launch has run on it, or was followed there


@contextlib.contextmanager
def lent(vm: Vm) -> Iterator[Lease]:
    """Delete the VM afterwards; not one that was there before, if this launch fails before a stage has run on it."""
    now = tpu_vm.find(vm)  # who is not logged in is told here, when there is nothing to delete
    lease = Lease(vm, theirs=now not in {None, *tpu_vm.ENDED})
    try:
        yield lease
    except BaseException:
        if vm.ours and lease.theirs and not lease.begun:
            whose = "it was there before, perhaps for another launcher; if not, it costs until it is deleted"
            say(f"{vm.name} is kept: {whose}: {shlex.join(vm.delete())}")
        else:
            with contextlib.suppress(EnvironmentProblem):  # the cause to tell is what ended the chain
                _release(vm)
        raise
    _release(vm)


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
