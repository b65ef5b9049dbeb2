"""Faults of a launch. The chain is cancelled first, which is how a user has something to launch again."""

from __future__ import annotations

import time

from tests.chaos import place
from tests.chaos.place import restart_slurmctld, wait
from tests.chaos.scene import SECONDS, Scene, WrongError


def killed(scene: Scene) -> None:
    """After any of its submissions; the same command adds the rest."""
    missing = scene.cancel()
    after = scene.chance.randint(1, len(missing))
    with place.start(scene.place) as launcher:
        wait(lambda: launcher.poll() is not None or len(scene.place.jobs() or ()) >= after, SECONDS, pause=0.01)
        launcher.kill()
    if (running := scene.place.running()) and after < len(missing):
        raise WrongError(f"{running.stage} runs although the launcher died after {after} of {len(missing)}")
    _again(scene)
    scene.check_queue(missing)


def twice(scene: Scene) -> None:
    """Two at once."""
    missing = scene.cancel()
    with place.start(scene.place) as first, place.start(scene.place) as second:
        said = [launcher.communicate(timeout=SECONDS)[0] for launcher in (first, second)]
    if first.returncode or second.returncode:
        raise WrongError(f"exit codes {first.returncode}, {second.returncode}: {said}")
    scene.check_queue(missing)


def without_slurmctld(scene: Scene) -> None:
    """slurmctld is killed when a launch has begun, and is back some seconds later."""
    missing = scene.cancel()
    with place.start(scene.place) as launcher:
        time.sleep(scene.chance.uniform(0, 5))
        scene.place.cluster.kill("slurmctld")
        time.sleep(scene.chance.uniform(0, 10))
        restart_slurmctld(scene.place.cluster)
        said, _ = launcher.communicate(timeout=120)
    if launcher.returncode not in (0, 75):
        raise WrongError(f"exit code {launcher.returncode}: {said}")
    _again(scene)
    scene.check_queue(missing)


def _again(scene: Scene) -> None:
    done = scene.place.go()
    if done.returncode:
        raise WrongError(f"the launch: {done.stdout}")
