"""A chain on TPU VMs: one VM after the other, as they are taken away, until its results are here."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import state, store, tpu, tpu_vm
from jobs.local import StageFailed
from jobs.plan import Step
from jobs.stages import Chain
from jobs.tpu_code import Code
from jobs.tpu_shown import Ended, end, handling, shown, start
from jobs.tpu_vm import Vm
from utils import mirror_views, paths
from utils.errors import EnvironmentProblem, RelayError, Stopped


def run(chain: Chain, steps: Sequence[Step], code: Code) -> None:
    """Run the steps of a plan, and collect what each has made.

    Raises: StageFailed; Stopped by a signal, with the stage's work saved; EnvironmentProblem.
    """
    paths.make_private(chain.dir.submitted)
    vm = Vm.of(chain)
    with handling(_interrupt), _lent(vm):
        session = _Session(chain, vm, code)
        for step in steps:
            if step.action == "skip":
                print(f"{step.stage}: done already, skipped", flush=True)
                session.collect(step.stage)
            else:
                session.complete(step)


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _lent(vm: Vm) -> Iterator[None]:
    """Delete the VM afterwards, if it is ours."""
    tpu_vm.find(vm)  # who is not logged in is told here, when there is nothing to delete
    try:
        yield
    except BaseException:
        with contextlib.suppress(EnvironmentProblem):  # the cause to tell is what ended the chain
            _release(vm)
        raise
    _release(vm)


def _release(vm: Vm) -> None:
    if not vm.ours:
        print(f"{vm.name} is kept: it was there before (tpu.name)", flush=True)
        return
    with contextlib.suppress(OSError):  # a terminal that is gone must not keep the VM
        print(f"{vm.name}: deleting it", flush=True)
    try:
        tpu_vm.delete(vm)
    except BaseException:
        print(f"{vm.name} may still be there, and cost: {shlex.join(vm.delete())}", file=sys.stderr, flush=True)
        raise


class _Session:
    """The stages of one launch, on one VM after the other."""

    def __init__(self, chain: Chain, vm: Vm, code: Code) -> None:
        self.chain, self.vm, self.code = chain, vm, code
        self.prepared = False  # the VM that there is now

    def complete(self, step: Step) -> None:
        """Run one stage until it is done. Raises: see `run`."""
        stage, url = step.stage, self.chain.url(step.stage)
        if step.action == "again":
            self._set_aside(stage)
        print(f"{stage}: starting", flush=True)
        idle, begins = 0, mirror_views.newest_checkpoint(url)
        while lost := self._attempt(step):
            cause, restarts = lost
            now = mirror_views.newest_checkpoint(url)
            idle = idle + restarts if now == begins else 0
            begins = now
            where = begins or "its beginning"
            if idle > state.MAX_IDLE:
                raise EnvironmentProblem(f"{stage}: {idle} attempts in a row came no further than {where}; now {cause}")
            print(f"{stage}: {cause}; it goes on from {where}", flush=True)
        print(f"{stage}: collected into {self.chain.run_dir(stage).path}", flush=True)

    def collect(self, stage: str) -> None:
        """Bring the stage's run directory here from the store."""
        mirror_views.pull(self.chain.url(stage), self.chain.run_dir(stage).path)

    def _attempt(self, step: Step) -> tuple[str, bool] | None:
        """Run the stage on the VM. None: it is done; else why it has to go on, and whether it has to be started again.

        Raises: see `run`.
        """
        stage = step.stage
        if cause := self._prepare(stage):
            return cause, True
        ended, asked = self._run_there(step)
        mirror_views.pull_markers(self.chain.url(), self.chain.dir.path)
        record = state.marker(self.chain, stage)
        done = record["status"] == "done"
        if not done and not asked and (cause := self._lost(ended, record)):
            self.prepared = False
            return cause, not ended.followed
        self.collect(stage)
        if asked:
            raise Stopped(f"{stage}: {record.get('cause') or record['status']}; the same command goes on from there")
        if not done:
            raise self._failure(stage, ended, record)
        return None

    def _prepare(self, stage: str) -> str | None:
        """Have a VM with the code; why there is none after all. Raises: InputError, EnvironmentProblem."""
        if self.prepared:
            return None
        tpu_vm.ensure(self.vm)
        archive = self.code.write(self.chain.dir.submitted)
        print(f"{self.vm.name}: copying {len(self.code.names)} files, and setting up", flush=True)
        for argv in tpu.preparation(self.vm, self.code, archive):
            if cause := self._command(stage, argv):
                return cause
        self.prepared = True
        return None

    def _command(self, stage: str, argv: Sequence[str]) -> str | None:
        """Run a command; the VM's fate if that made it fail. Raises: EnvironmentProblem if it did so by itself."""
        if code := shown(argv, self._log(stage)).gcloud:
            if gone := self._gone():
                return gone
            raise EnvironmentProblem(f"{self.vm.name}: exit code {code}, see {self._log(stage)}: {shlex.join(argv)}")
        return None

    def _set_aside(self, stage: str) -> None:
        """Keep what was done before beside it: in the store, here, and on a VM that was used before."""
        aside = store.set_aside(self.chain, stage)
        print(f"{stage}: what was done before is now in {aside}", flush=True)
        if not self._prepare(stage):
            self._command(stage, self.vm.ssh(tpu.aside_command(self.chain, self.code, stage)))

    def _run_there(self, step: Step) -> tuple[Ended, bool]:
        """Run the stage, or follow it where it runs; whether it was asked to end. Raises: KeyboardInterrupt."""
        asking: list[subprocess.Popen[bytes]] = []

        def ask() -> None:
            if asking:
                raise KeyboardInterrupt
            print(f"{step.stage}: asked to save its work and to end; ask again to give it up", flush=True)
            there = self.vm.ssh(tpu.stop_command(self.chain, self.code, step.stage))
            asking.append(start(there))

        try:
            with handling(ask):
                ended = shown(self.vm.ssh(tpu.stage_command(self.chain, self.code, step)), self._log(step.stage))
        finally:
            for process in asking:
                end(process)
        return ended, bool(asking)

    def _log(self, stage: str) -> Path:
        return self.chain.dir.submitted / f"tpu_{stage}.log"

    def _gone(self) -> str | None:
        """What has become of the VM, if it is not there any more."""
        now = tpu_vm.find(self.vm)
        return None if now == "READY" else f"{self.vm.name} is {now or 'gone'}"

    def _lost(self, ended: Ended, record: Mapping[str, Any]) -> str | None:
        """Why a stage that did not get to its own end has to go on; None if it failed."""
        if gone := self._gone():
            return gone
        if not ended.codes or (ended.gcloud and not ended.code):
            return f"the connection to {self.vm.name} is lost"
        if ended.code >= 128:
            return f"its processes were killed (exit code {ended.code})"
        return record["cause"] if record["status"] == "preempted" and not ended.code else None

    def _failure(self, stage: str, ended: Ended, record: Mapping[str, Any]) -> RelayError:
        printed = f"what it printed: {self._log(stage)}"
        if record["status"] == "failed" and record["exit_code"] == ended.code:
            log = self.chain.run_dir(stage).logs / Path(record["log"]).name  # it is here now
            return StageFailed(f"{stage} failed: {record['cause']} (log: {log}; {printed})", ended.code)
        cause = ended.cause or f"its processes have ended, and it is {record['status']} in {self.chain.store}"
        return StageFailed(f"{stage}: {cause} ({printed})", ended.code or 1)
