"""A stand-in for gcloud and the machines behind it: calls are recorded, a VM is a folder with real processes.

    python -m tests.fake_gcloud FOLDER compute tpus ...      # what the `gcloud` on a test's PATH runs

FOLDER/disk is the home directory of the VM, FOLDER/bucket the storage. What goes wrong is asked for in FOLDER/plan:
    {"deny": TEXT}                    every call ends with this text of gcloud's
    {"refuse": {VERB: [TEXT, ...]}}   the next calls of a verb do
    {"queue": N}                      a queued request is ACTIVE when it has been asked about N times
    {"ssh": [[WORD, TEXT, FATE]]}     the next command with WORD in it meets its fate when it prints TEXT:
                                      preempt, terminate, vanish (the VM), drop (the connection, and gcloud tries
                                      again), lose (it does not), kill (the stage)
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

FATES = {"preempt": "PREEMPTED", "terminate": "TERMINATED", "vanish": None}
NOT_FOUND = "NOT_FOUND: Resource 'projects/p/locations/z/nodes/{}' was not found"


class Google:
    """What there is: VMs, requests for them, a disk and a bucket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk, self.bucket, self.plan = (folder / name for name in ("disk", "bucket", "plan"))

    @contextlib.contextmanager
    def state(self) -> Iterator[dict[str, Any]]:
        """VMs (name: state) and requests (name: how often asked about), to read and change."""
        with open(self.folder / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self.folder / "state"
            state = json.loads(file.read_text()) if file.exists() else {"vms": {}, "requests": {}}
            yield state
            _write(file, state)

    def vms(self) -> dict[str, str]:
        with self.state() as state:
            return state["vms"]

    def wanted(self, key: str) -> Any:
        return json.loads(self.plan.read_text()).get(key) if self.plan.exists() else None

    def want(self, **plan: Any) -> None:
        _write(self.plan, plan)

    def calls(self) -> list[list[str]]:
        """The arguments of every call so far."""
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def remote(self) -> list[list[str]]:
        """The arguments of every stage that was started on a VM."""
        file = self.folder / "remote"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def take_away(self, name: str, fate: str) -> None:
        """End the VM's processes, and the VM with its disk."""
        with self.state() as state:
            state["vms"].pop(name)
            if now := FATES[fate]:
                state["vms"][name] = now
        self.kill()
        shutil.rmtree(self.disk)

    def cut(self) -> None:
        """End every connection to a VM; what runs there goes on."""
        folder, verb = str(self.folder), "ssh"
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (directory / "cmdline").read_text().split("\0")
                if words[2:3] == [folder] and verb in words:
                    os.kill(int(directory.name), signal.SIGKILL)

    def kill(self, module: str = "") -> None:
        """End every process that was started on the VM, or those of one Python module."""
        mark = f"RELAY_FAKE_VM={self.folder}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = mark in (folder / "environ").read_bytes().split(b"\0")
                if ours and module in ("", (folder / "cmdline").read_text().split("\0")[2]):
                    os.kill(int(folder.name), signal.SIGKILL)


def _write(file: Path, value: Any) -> None:
    """Whole or not at all: a gcloud is ended at any time."""
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(value))
    os.replace(new, file)


def main(google: Google, argv: list[str]) -> None:
    with open(google.folder / "calls", "a") as calls:
        calls.write(json.dumps(["gcloud", *argv]) + "\n")
    parser = argparse.ArgumentParser(prog="gcloud", allow_abbrev=False)
    for word in ("compute", "tpus", "group", "verb"):
        parser.add_argument(word)
    parser.add_argument("things", nargs="+")
    for flag in ("zone", "project", "format", "worker", "command", "accelerator-type", "version", "node-id"):
        parser.add_argument(f"--{flag}")
    for flag in ("runtime-version", "valid-until-duration"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--ssh-flag", action="append")
    for flag in ("quiet", "spot", "force"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args(argv)
    if denied := google.wanted("deny"):
        _refuse(denied)
    refusals = google.wanted("refuse") or {}
    if texts := refusals.get(given.verb):
        google.want(**{**json.loads(google.plan.read_text()), "refuse": {**refusals, given.verb: texts[1:]}})
        _refuse(texts[0])
    assert given.zone and given.quiet
    kind = "vms" if given.group == "tpu-vm" else "requests"
    {"ssh": _ssh, "scp": _scp, "create": _create, "describe": _describe, "delete": _delete}[given.verb](
        google, kind, given
    )


def _refuse(text: str) -> NoReturn:
    sys.exit(f"ERROR: (gcloud.compute.tpus) {text}")


def _create(google: Google, kind: str, given: argparse.Namespace) -> None:
    (name,) = given.things
    assert given.accelerator_type
    with google.state() as state:
        if name in state[kind]:
            _refuse(f"ALREADY_EXISTS: {name}")
        if kind == "vms":
            assert given.version
            state["vms"][name] = "READY"
        else:
            assert given.runtime_version and given.valid_until_duration and given.node_id == name
            state["requests"][name] = 0
    google.disk.mkdir(exist_ok=True)


def _describe(google: Google, kind: str, given: argparse.Namespace) -> None:
    (name,) = given.things
    with google.state() as state:
        if name not in state[kind]:
            _refuse(NOT_FOUND.format(name))
        if kind == "vms":
            assert given.format == "value(state)"
            print(state["vms"][name])
            return
        assert given.format == "value(state.state)"
        asked = state["requests"][name]
        if isinstance(asked, int) and asked >= (google.wanted("queue") or 0):
            asked = state["requests"][name] = "ACTIVE"
            state["vms"][name] = "READY"
        elif isinstance(asked, int):
            state["requests"][name] += 1
            asked = "WAITING_FOR_RESOURCES"
        print(asked)


def _delete(google: Google, kind: str, given: argparse.Namespace) -> None:
    (name,) = given.things
    with google.state() as state:
        if name not in state[kind]:
            _refuse(NOT_FOUND.format(name))
        if kind == "requests":
            assert given.force
            del state["requests"][name]
        state["vms"].pop(name, None)
    google.kill()
    shutil.rmtree(google.disk, ignore_errors=True)


def _scp(google: Google, _: str, given: argparse.Namespace) -> None:
    source, target = given.things
    name, _, place = target.partition(":")
    _need(google, name)
    assert given.worker == "all"
    shutil.copyfile(source, google.disk / place)


def _need(google: Google, name: str) -> None:
    now = google.vms().get(name)
    if now is None:
        _refuse(NOT_FOUND.format(name))
    if now != "READY":
        _refuse(f'This TPU has terminal state "{now}", so it cannot be used anymore.')


def _ssh(google: Google, _: str, given: argparse.Namespace) -> None:
    (name,) = given.things
    _need(google, name)
    assert given.worker == "all"
    assert given.ssh_flag == ["-oServerAliveInterval=30", "-oServerAliveCountMax=10"]
    print("SSH: Attempting to connect to worker 0...", file=sys.stderr, flush=True)
    theirs = ("PATH", "LANG", "STORAGE_EMULATOR_HOST", "PJRT_DEVICE", "XLA_FLAGS")
    environ = {key: os.environ[key] for key in theirs if key in os.environ}
    environ |= {"HOME": str(google.disk), "RELAY_FAKE_VM": str(google.folder), "OMP_NUM_THREADS": "1"}
    shell = ["bash", "-c", " ".join(given.command.split(" "))]  # as gcloud and ssh do
    fate = "drop"
    while fate == "drop":
        process = subprocess.Popen(
            shell,
            cwd=google.disk,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if (fate := _show(google, name, process, given.command)) == "drop":
            print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", flush=True)
    code = -1 if fate == "lose" else process.wait()
    sys.exit(255 if code < 0 else code)


def _show(google: Google, name: str, process: subprocess.Popen[bytes], command: str) -> str:
    """Print what a command prints until it ends or meets its fate."""
    assert process.stdout
    for line in process.stdout:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        fates = google.wanted("ssh")
        if not fates or fates[0][0] not in command or fates[0][1].encode() not in line:
            continue
        fate = fates[0][2]
        google.want(**{**json.loads(google.plan.read_text()), "ssh": fates[1:]})
        if fate in ("drop", "lose"):
            return fate  # what runs there goes on
        google.kill("utils.xla_run") if fate == "kill" else google.take_away(name, fate)
    return ""


if __name__ == "__main__":
    main(Google(Path(sys.argv[1])), sys.argv[2:])
