"""A chain, and the faults that it meets."""

from __future__ import annotations

import datetime
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tests.chaos import processes
from tests.chaos.faults import FAULTS
from tests.chaos.place import Place, wait
from tests.chaos.record import Line
from tests.chaos.scene import LaterError, Scene, WrongError
from utils.errors import RelayError

DEADLINE = 300  # seconds in which a chain that meets one fault comes further
ENOUGH = 3  # faults that were not survived, and no more are tried
TROUBLE = (WrongError, RelayError, OSError, subprocess.SubprocessError)  # the last when a command takes too long
Position = tuple[str, int]  # stage and step
EVAL = ("eval", 0)  # after all steps


@dataclass
class Injected:
    """A fault, and what came of it."""

    name: str
    where: Position
    injected: bool = False
    survived: bool = False
    relaunched: int = 0
    lines: list[Line] = field(default_factory=list)  # trained after it, until the next one
    redone: int = 0  # of those, steps that had been trained before


def plan(names: Sequence[str], count: int, order: Sequence[Position], chance: random.Random) -> list[Injected]:
    """`count` faults in the order of their positions; each kind as often as any other, give or take one.

    Raises: ValueError when there are too few steps for them.
    """
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += chance.sample(names, len(names))
    kinds = kinds[:count]
    chance.shuffle(kinds)
    places = sorted(chance.sample(range(len(order) - 6), count))  # the last steps are there to catch up in
    where = [order[index] for index in places]
    late = [index for index, name in enumerate(kinds) if FAULTS[name].anywhere]
    if EVAL in order and late:
        kinds.append(kinds.pop(late[-1]))
        where[-1] = EVAL
    return [Injected(name, position) for name, position in zip(kinds, where, strict=True)]


class Driver:
    """Runs the chain of `place` through the faults of `todo`."""

    def __init__(self, place: Place, order: Sequence[Position], todo: Sequence[Injected], chance: random.Random):
        self.place, self.todo, self.chance = place, todo, chance
        self.index = {position: number for number, position in enumerate(order)}
        self.lines: list[Line] = []
        self.counts: dict[tuple[str, str], int] = {}
        self.now: Injected | None = None

    def run(self) -> None:
        """Start the chain, inject every fault, and see the chain end. Raises: WrongError when it cannot go on."""
        self._launch()
        wrong = 0
        for fault in self.todo:
            try:
                self._until(partial(self._is_at, fault.where), f"at {fault.where}")
                self._inject(fault)
            except TROUBLE as error:
                say(f"{fault.name}: NOT SURVIVED: {error}\n{self.place.status()}")
                wrong += 1
                if wrong == ENOUGH:
                    raise
                self._start_over()
        self._until(self.place.is_done, "the end")
        self.poll()

    def poll(self) -> None:
        """Take note of the steps trained since the last time."""
        counts: dict[tuple[str, str], int] = {}
        seen = {(line.stage, line.step) for line in self.lines}
        for line in self.place.lines():
            key = line.stage, line.attempt
            counts[key] = counts.get(key, 0) + 1
            if counts[key] <= self.counts.get(key, 0):
                continue
            if self.now:
                self.now.lines.append(line)
                self.now.redone += (line.stage, line.step) in seen
            seen.add((line.stage, line.step))
            self.lines.append(line)
        self.counts = counts

    def _is_at(self, where: Position) -> bool:
        return self._reached() >= self.index[where]

    def _has_more_than(self, lines: int) -> bool:
        return len(self.lines) > lines or self.place.is_done()

    def _reached(self) -> int:
        if EVAL in self.index and self.place.marker("eval").get("status") in ("running", "done"):
            return self.index[EVAL]
        return max((self.index[line.stage, line.step] for line in self.lines), default=-1)

    def _inject(self, fault: Injected) -> None:
        """Inject the fault as soon as there is what it hits, and wait until the chain has gone on."""
        kind = FAULTS[fault.name]
        while not self.place.is_done():
            self.poll()
            lines, attempts, job = len(self.lines), {line.attempt for line in self.lines}, self.place.running()
            if job and (kind.anywhere or job.stage != "eval"):
                before, self.now = self.now, fault
                began = time.monotonic()
                try:
                    fault.injected = True
                    kind.inject(Scene(self.place, job, self.chance))
                except LaterError:
                    self.now, fault.injected = before, False
                else:
                    done = self._gone_on(lines, attempts if kind.ends else None)
                    fault.survived = True
                    seconds, last = time.monotonic() - began, f"step {self.lines[-1].step} of {self.lines[-1].stage}"
                    again = ", launched again" if fault.relaunched else ""
                    say(f"{fault.name} in {job.stage} (job {job.id}): on after {seconds:.0f} s{again}, {last}{done}")
                    return
            self._until(partial(self._has_more_than, lines), "another step")
        say(f"{fault.name}: NOT INJECTED: the chain has ended")

    def _gone_on(self, lines: int, attempts: set[str] | None) -> str:
        """Wait for a step of another attempt than these, or just for another step."""

        def gone_on() -> bool:
            new = self.lines[lines:]
            return self.place.is_done() or any(attempts is None or line.attempt not in attempts for line in new)

        self._until(gone_on, "a step after the fault")
        return ", the chain has ended" if self.place.is_done() else ""

    def _until(self, probe: Callable[[], object], what: str) -> None:
        """Keep the chain going until then. Raises: WrongError when it comes no further for too long."""
        end, reached = time.monotonic() + DEADLINE, self._reached()
        while not probe():
            self._keep_alive()
            self.poll()
            if self._reached() > reached:
                end, reached = time.monotonic() + DEADLINE, self._reached()
            if time.monotonic() > end:
                raise WrongError(f"no further in {DEADLINE} s, not {what}")
            time.sleep(0.1)

    def _keep_alive(self) -> None:
        """Launch again what has failed, as a user would."""
        jobs = self.place.jobs()
        if jobs is None:
            return
        held = [job for job in jobs if "held" in job.reason.lower()]
        if (held or not jobs) and not self.place.is_done():
            for line in self.place.status().splitlines():
                if re.match(r"\w+ +(FAILED|STALE|PREEMPTED|NODE_FAIL|OUT_OF_MEMORY)", line) or "held" in line.lower():
                    say(f"    {line}")
            if self.now:
                self.now.relaunched += 1
            self._launch()

    def _launch(self) -> None:
        done = self.place.go()
        if done.returncode:
            raise WrongError(f"the launcher ended with {done.returncode}: {done.stdout}")

    def _start_over(self) -> None:
        """After a fault that was not survived: the others shall have a chance."""
        for process in processes.of_jobs(self.place.cluster.env["SLURM_CONF"]):
            process.send(signal.SIGKILL)
        self.place.run(*self.place.launcher("--cancel"))
        if not wait(lambda: self.place.jobs() == [], DEADLINE):
            raise WrongError("cancelled jobs do not end")


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)
