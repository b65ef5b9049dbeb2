"""On a TPU VM: the processes of one stage, which outlive the connection that started them. Needs no package.

    python3 -m jobs.tpu_remote run CHAIN STAGE COMMAND...  # start it, unless it runs; show what it prints; end like it
    python3 -m jobs.tpu_remote stop CHAIN STAGE [COMMAND]  # ask it to save its work and to end
    python3 -m jobs.tpu_remote end CHAIN STAGE COMMAND...  # both: ask it to end, and show what it prints until it has
    python3 -m jobs.tpu_remote tidy                        # remove older copies of the code, if nothing runs

A connection of many hours breaks, and gcloud then calls ssh with the same command again, up to ten times: the second
call must follow the run of the first and start no other.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from utils import stop

ENDED = "relay-tpu: the stage ended with {}"  # the launcher reads it: gcloud's own exit code says less
STARTED = "relay-tpu: it starts here"
FOLLOWED = "relay-tpu: it runs here already"
REFUSED = "relay-tpu: it runs here with another command: {}"
OTHER = 78  # exit code with that line; no stage ends with it
CODE = r"relay-[0-9a-f]{12}(\.tar\.gz)?"  # jobs/tpu_code.py names it
VANISHED = 137  # as if killed: it left no exit code
TAIL = 4096  # bytes shown of what was printed before this connection
PAUSE = 0.2  # seconds
PATIENCE = 60  # seconds; who asks a stage to end may be faster than the connection that starts it


class Files:
    """What is kept about a stage, in the home directory: a launcher that comes with newer code finds it too."""

    def __init__(self, chain: str, stage: str) -> None:
        folder = Path.home() / ".relay" / chain
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.lock = folder / f"{stage}.lock"  # held while the stage runs; the kernel frees it, whatever happens
        self.log, self.pid, self.code = (folder / f"{stage}.{what}" for what in ("log", "pid", "code"))
        self.command = folder / f"{stage}.command"


def run(files: Files, command: list[str], begin: bool = True) -> int:
    """Start the command unless it runs, follow it, and return its exit code; OTHER if the stage runs by another.

    Args:
        begin: start it; else what has ended is as if it had ended now.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody listens any more: the stage does not mind
    with open(files.lock, "a") as lock:
        free = _locked(lock.fileno(), tries=5)  # others only look, for a moment
        begun = free and begin
        if begun:
            _start(files, command, lock.fileno())
        elif not free and (other := files.command.read_text()) != shlex.join(command):
            print(REFUSED.format(other), flush=True)
            return OTHER
        print(STARTED if begun else FOLLOWED, flush=True)
    with open(files.log, "rb") as log:
        if not begun:
            log.seek(max(0, files.log.stat().st_size - TAIL))
        _follow(files, log)
    try:
        code = int(files.code.read_text())
    except FileNotFoundError:
        code = VANISHED
    print(f"\n{ENDED.format(code)}", flush=True)
    return code


def _locked(descriptor: int, tries: int = 1) -> bool:
    for left in reversed(range(tries)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(PAUSE if left else 0)
    return False


def _start(files: Files, command: list[str], lock: int) -> None:
    """Start a keeper in a session of its own. It inherits the lock, and whoever asks it to end is heard from now on."""
    for file in (files.code, files.pid):
        file.unlink(missing_ok=True)
    files.command.write_text(shlex.join(command))
    keeper = [sys.executable, "-m", "jobs.tpu_remote", "keep", str(files.code), str(lock), *command]
    with open(files.log, "wb") as log, stop.held_back():
        process = subprocess.Popen(
            keeper, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True
        )
    files.pid.write_text(str(process.pid))


def keep(code: Path, lock: int, command: list[str]) -> None:
    """Run the command, which holds the lock too, pass on what asks it to end, and write down how it ended."""
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def passed_on(number: int, _: object) -> None:
        asked.append(number)
        if process:
            process.terminate()

    for number in stop.SIGNALS:
        signal.signal(number, passed_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop.SIGNALS)
    process = subprocess.Popen(command, pass_fds=(lock,))
    if asked:
        process.terminate()
    ended = process.wait()
    temporary = code.with_suffix(".new")
    temporary.write_text(str(ended if ended >= 0 else 128 - ended))
    os.replace(temporary, code)


def _follow(files: Files, log: BinaryIO) -> None:
    """Print what the stage prints until it has ended."""
    with open(files.lock, "a") as lock:
        running = True
        while running:
            running = not _locked(lock.fileno())  # asked before reading: nothing is written after the last read
            while data := log.read(1 << 16):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            if running:
                time.sleep(PAUSE)


def ask_to_end(files: Files, command: list[str], patience: float = PATIENCE) -> None:
    """Ask the stage, if it runs by that command; an empty one stands for any."""
    end = time.monotonic() + patience
    while True:
        with open(files.lock, "a") as lock:
            if not _locked(lock.fileno()) and files.pid.exists():
                if command and files.command.read_text() != shlex.join(command):
                    break
                os.kill(int(files.pid.read_text()), signal.SIGTERM)
                return
        if time.monotonic() > end:
            break
        time.sleep(PAUSE)
    print("nothing runs here", flush=True)


def tidy() -> None:
    """Remove the copies of the code beside this one, unless a stage runs: it may be by one of them."""
    for lock in Path.home().glob(".relay/*/*.lock"):
        with open(lock) as file:
            if not _locked(file.fileno()):
                return
    for path in Path.home().glob("relay-*"):
        if re.fullmatch(CODE, path.name) and not path.name.startswith(Path.cwd().name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "run":
        sys.exit(run(Files(*rest[:2]), rest[2:]))
    if verb == "end":
        ask_to_end(Files(*rest[:2]), rest[2:], patience=0)
        sys.exit(run(Files(*rest[:2]), rest[2:], begin=False))
    if verb == "stop":
        ask_to_end(Files(*rest[:2]), rest[2:])
    if verb == "tidy":
        tidy()
    if verb == "keep":
        keep(Path(rest[0]), int(rest[1]), rest[2:])
