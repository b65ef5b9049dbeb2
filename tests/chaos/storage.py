"""Faults of what is on the disk, and of the disk."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.scene import LaterError, Scene


def damaged(scene: Scene, damage: Callable[[Scene, bytearray], bytes | bytearray]) -> None:
    """The newest checkpoint is damaged while the stage waits to go on."""
    scene.newest_checkpoint()
    scene.slurm("scontrol", "requeuehold")
    try:
        scene.wait_until_over()
        if scene.place.marker(scene.job.stage).get("status") != "preempted":
            raise LaterError("the stage has ended")
        path = scene.newest_checkpoint()
        path.write_bytes(damage(scene, bytearray(path.read_bytes())))
    finally:
        scene.place.cluster.run("scontrol", "release", scene.job.id)


def flip(scene: Scene, content: bytearray) -> bytearray:
    content[scene.chance.randrange(len(content))] ^= 1 << scene.chance.randrange(8)
    return content


def truncated(scene: Scene) -> None:
    damaged(scene, lambda scene, content: content[: scene.chance.randrange(len(content))])


def zeroed(scene: Scene) -> None:
    damaged(scene, lambda _, content: bytes(len(content)))


def bit_flipped(scene: Scene) -> None:
    damaged(scene, flip)


def disk_full(scene: Scene) -> None:
    size = scene.newest_checkpoint().stat().st_size
    scene.disk().fill(scene.chance.choice([0, size // 2]))
    try:
        scene.wait_until_over()
    finally:
        scene.disk().empty()


def disk_read_only(scene: Scene) -> None:
    scene.disk().freeze()
    try:
        scene.wait_until_over()
    finally:
        scene.disk().thaw()
