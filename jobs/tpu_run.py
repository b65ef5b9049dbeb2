"""A chain on TPU VMs: one VM after the other, as they are taken away, until its results are here."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jobs import state, store, tpu, tpu_vm
from jobs.local import StageFailed
from jobs.plan import Step
from jobs.stages import Chain
from jobs.tpu_code import Code
from jobs.tpu_gcloud import POLL, Exists, patiently
from jobs.tpu_lease import Lease, lent
from jobs.tpu_shown import Ended, end, handling, say, shown, start
from jobs.tpu_vm import Vm
from utils import manifest, mirror_views, paths
from utils.errors import EnvironmentProblem, InputError, RelayError, Stopped

T = TypeVar("T")


def run(chain: Chain, steps: Sequence[Step], code: Code) -> None:
    """Run the steps of a plan, and collect what each has made.

    Raises: StageFailed; Stopped by a signal, with the stage's work saved; InputError; EnvironmentProblem.
    """
    paths.make_private(chain.dir.submitted)
    with handling(_interrupt), lent(Vm.of(chain)) as lease:
        session = _Session(chain, lease, code)
        for step in steps:
            if step.action == "skip":
                say(f"{step.stage}: done already, skipped")
                session.collect(step.stage)
            else:
                session.complete(step)


def _interrupt() -> None:
    raise KeyboardInterrupt


class _Session:
    """The stages of one launch, on one VM after the other."""

    def __init__(self, chain: Chain, lease: Lease, code: Code) -> None:
        self.chain, self.lease, self.vm, self.code = chain, lease, lease.vm, code
        self.prepared = False  # the VM that there is now
        self.asked = False  # to end, by a signal

    def complete(self, step: Step) -> None:
        """Run one stage until it is done. Raises: see `run`."""
        stage, url = step.stage, self.chain.url(step.stage)
        if step.action == "again":
            self._set_aside(stage)
        say(f"{stage}: starting")
        idle, begins = 0, self._patiently(lambda: mirror_views.newest_checkpoint(url))
        while lost := self._attempt(step):
            cause, restarts = lost
            now = self._patiently(lambda: mirror_views.newest_checkpoint(url))
            idle = idle + restarts if now == begins else 0
            begins = now
            where = begins or "its beginning"
            if idle > state.MAX_IDLE:
                raise EnvironmentProblem(f"{stage}: {idle} attempts in a row came no further than {where}; now {cause}")
            say(f"{stage}: {cause}; it goes on from {where}")
            time.sleep(POLL)
        say(f"{stage}: collected into {self.chain.run_dir(stage).path}")

    def _patiently(self, ask: Callable[[], T]) -> T:
        """What nothing depends on yet is told at once."""
        return patiently(ask) if self.lease.begun else ask()

    def collect(self, stage: str) -> None:
        """Bring the stage's run directory here from the store."""
        self._patiently(lambda: mirror_views.pull(self.chain.url(stage), self.chain.run_dir(stage).path))

    def _attempt(self, step: Step) -> tuple[str, bool] | None:
        """Run the stage on the VM. None: it is done; else why it has to go on, and whether it has to be started again.

        Raises: see `run`.
        """
        stage = step.stage
        if cause := self._prepare(stage):
            return cause, True
        ended = self._run_there(step)
        if ended.refused:
            stop = shlex.join(self.vm.ssh(tpu.stop_command(self.chain, self.code, stage)))
            other = f"{stage} runs on {self.vm.name} with another command: {ended.refused}"
            raise InputError(f"{other}; end its launcher with Ctrl-C, or if that is gone: {stop}")
        self.lease.begun |= ended.started or ended.followed
        self._patiently(lambda: mirror_views.pull_markers(self.chain.url(), self.chain.dir.path))
        record = state.marker(self.chain, stage)
        done = record["status"] == "done"
        cause = None if done else self._lost(ended, record)
        if self.asked and (done or record["status"] == "preempted" or (cause and self._gone())):
            self.collect(stage)
            raise Stopped(f"{stage}: {record.get('cause') or cause or 'done'}; the same command goes on from there")
        if cause:
            self.prepared = False
            return cause, not ended.followed
        self.collect(stage)
        if not done:
            raise self._failure(stage, ended, record)
        return None

    def _prepare(self, stage: str) -> str | None:
        """Have a VM with the code; why there is none after all. Raises: InputError, EnvironmentProblem."""
        if self.prepared:
            return None
        try:
            tpu_vm.ensure(self.vm, self.lease.making)
        except Exists:  # another launcher was faster
            self.lease.made = self.lease.begun = False
            raise
        archive = self.code.write(self.chain.dir.submitted)
        say(f"{self.vm.name}: copying {len(self.code.names)} files, and setting up")
        for argv in tpu.preparation(self.vm, self.code, archive):
            if cause := self._command(stage, argv):
                return cause
        self.prepared = True
        return None

    def _command(self, stage: str, argv: Sequence[str]) -> str | None:
        """Run a command; the VM's fate if that made it fail. Raises: EnvironmentProblem if it did so by itself."""

        def attempt() -> str | None:
            code = shown(argv, self._log(stage)).gcloud
            if not code or (gone := self._gone()):
                return gone if code else None
            raise EnvironmentProblem(f"{self.vm.name}: exit code {code}, see {self._log(stage)}: {shlex.join(argv)}")

        return self._patiently(attempt)

    def _set_aside(self, stage: str) -> None:
        """Keep what was done before beside it: in the store, here, and on a VM that was used before."""
        aside = self._patiently(lambda: store.set_aside(self.chain, stage))
        say(f"{stage}: what was done before is now in {aside}")
        if not self._prepare(stage):
            self._command(stage, self.vm.ssh(tpu.aside_command(self.chain, self.code, stage)))

    def _run_there(self, step: Step) -> Ended:
        """Run the stage, or follow it where it runs; ask it to end when that is asked. Raises: KeyboardInterrupt."""
        asking: list[subprocess.Popen[bytes]] = []

        def there(verb: str) -> list[str]:
            return self.vm.ssh(tpu.stage_command(self.chain, self.code, step, verb))

        def ask() -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            say(f"{step.stage}: asked to save its work and to end; ask again to give it up")
            asking.append(start(there("stop")))

        try:
            with handling(ask):
                # asked already: perhaps without being heard, since the connection broke
                return shown(there("end" if self.asked else "run"), self._log(step.stage))
        finally:
            for process in asking:
                end(process)

    def _log(self, stage: str) -> Path:
        return self.chain.dir.submitted / f"tpu_{stage}.log"

    def _gone(self) -> str | None:
        """What has become of the VM, if it is not there any more."""
        now = patiently(lambda: tpu_vm.find(self.vm))
        return None if now == "READY" else f"{self.vm.name} is {now or 'gone'}"

    def _lost(self, ended: Ended, record: Mapping[str, Any]) -> str | None:
        """Why a stage that did not get to its own end has to go on; None if it failed."""
        if gone := self._gone():
            return gone
        if not ended.codes or (ended.gcloud and not ended.code):
            return f"the connection to {self.vm.name} is lost"
        if ended.code == EnvironmentProblem.exit_code and manifest.TAKEN_OVER not in ended.cause:
            return f"{ended.cause or 'its machine failed'} (exit code {ended.code})"
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
