"""Run a chain through faults and print the table: see tests/chaos/__init__.py."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import controls, processes, report
from tests.chaos.driver import DEADLINE, EVAL, TROUBLE, Driver, Injected, plan, say
from tests.chaos.faults import FAULTS
from tests.chaos.place import CHAIN, Place, start_cluster, wait
from tests.chaos.scene import WrongError
from utils.errors import InputError, cli

REFERENCE = "reference"


def chaos(place: Place, seed: int, count: int, names: Sequence[str]) -> bool:
    """Whether everything was survived and is the same in the end."""
    began, chance = time.monotonic(), random.Random(seed)
    reference, expected = undisturbed(place)
    say(f"the chain that nothing disturbs: {len(reference)} steps in {time.monotonic() - began:.0f} s")
    if why := place.mount():
        say(f"runs/ gets no disk of its own, no fault needs one then: {why}")
    usable = [name for name in names if place.disk or not FAULTS[name].needs_disk]
    order = [*reference, *([EVAL] if "eval" in place.stages else [])]
    driver = Driver(place, order, plan(usable, count, order, chance), chance)
    try:
        driver.run()
    except TROUBLE as error:
        say(f"the chain does not go on: {error}\n{place.status()}")
    return told(place, driver, reference, expected, f"seed {seed}, {time.monotonic() - began:.0f} s")


def undisturbed(place: Place) -> tuple[report.Steps, dict[str, str]]:
    """The steps and the results of a chain that is left alone. Raises: WrongError if it fails."""
    done = place.go(REFERENCE)
    if done.returncode or not wait(lambda: place.jobs(REFERENCE) == [], 4 * DEADLINE) or not place.is_done(REFERENCE):
        status = place.run(*place.launcher("--status", "--name", REFERENCE)).stdout
        raise WrongError(f"the undisturbed chain: {done.stdout}\n{status}")
    found = report.steps(place.lines(REFERENCE)), report.results(place, REFERENCE)
    shutil.rmtree(place.root / "runs" / REFERENCE)
    return found


def told(place: Place, driver: Driver, reference: report.Steps, expected: dict[str, str], last: str) -> bool:
    """Print the table; whether all in it is as it should be."""
    faults = driver.todo
    ended = place.is_done()
    conf = place.cluster.env["SLURM_CONF"]
    wait(lambda: not list(processes.of_jobs(conf)), 60)
    alive, files = list(processes.of_jobs(conf)), place.leftover_files()
    for what in (*alive, *files):
        say(f"left over: {what}")
    body = report.rows(faults, reference)
    found = report.results(place, CHAIN) if ended else {}
    finals = [[f"in the end: {name}", "", "", "", "", yes(found.get(name) == expected[name])] for name in expected]
    whole = {(line.stage, line.step) for line in driver.lines} == set(reference)
    finals.append(["every step, replays included", "", "", "", "", yes(whole and report.same(driver.lines, reference))])
    negative = controls.rows(place, reference) if ended and "r1" in place.stages else []
    print(report.table([*body, *finals]))
    print("\n".join("  ".join(row) for row in negative))
    print(summary(faults, driver, len(alive), len(files), last), flush=True)
    good = [fault.survived for fault in faults] + [row[-1] == "yes" for row in (*body, *finals)]
    return all(good) and ended and not alive and not files and all(row[-1] != "WRONG" for row in negative)


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def summary(faults: Sequence[Injected], driver: Driver, alive: int, files: int, last: str) -> str:
    """The last line."""
    injected = [fault for fault in faults if fault.injected]
    return (
        f"{len(injected)} faults of {len({fault.name for fault in injected})} kinds, "
        f"{sum(fault.survived for fault in injected)} survived; launched again {sum(f.relaunched for f in faults)} "
        f"times; {len(driver.lines)} steps, {sum(fault.redone for fault in faults)} of them again; "
        f"{files} temporary files and {alive} processes left over; {last}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Faults on a chain, from a seed.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--kinds", default=",".join(FAULTS), help="comma-separated (default: %(default)s)")
    arguments = parser.parse_args()
    names = arguments.kinds.split(",")
    if unknown := set(names) - set(FAULTS):
        raise InputError(f"unknown kinds: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory = Path(tempfile.mkdtemp(prefix="relay-chaos-"))
    cluster = start_cluster(directory / "slurm")
    try:
        place = Place(directory, cluster)
        try:
            good = chaos(place, arguments.seed, arguments.faults, names)
        finally:
            cluster.stop()
            if place.disk:
                place.disk.remove()
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    cli(main)
