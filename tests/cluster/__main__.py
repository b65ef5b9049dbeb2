"""The throw-away cluster by hand.

python -m tests.cluster install               # on Debian as root: apt-get what is missing
python -m tests.cluster up                    # in .cluster/; --dir elsewhere
export SLURM_CONF=$PWD/.cluster/slurm.conf    # sinfo, sbatch, srun, ... now talk to it
python -m tests.cluster down
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.cluster import GPUS, Cluster
from tests.cluster.machine import PATH, available
from utils.errors import InputError, cli

PACKAGES = ("slurm-wlm", "slurmdbd", "munge", "mariadb-server", "squashfs-tools", "squashfuse", "chromium")


def install() -> str:
    """apt-get what is missing; what came of it, in one line."""
    missing = (f"no {name}" for name in ("mksquashfs", "chromium") if not shutil.which(name, path=PATH))
    why = available() or next(missing, None)
    if not why:
        return "nothing is missing"
    if os.geteuid() or not shutil.which("apt-get"):
        return f"tests will be skipped: {why}"
    policy = Path("/usr/sbin/policy-rc.d")  # Debian's way to say that an installation starts no daemon
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update"], env=env, check=True)
        command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        subprocess.run(command, env=env, check=True)
    except subprocess.CalledProcessError as error:
        return f"tests will be skipped: {error}"
    finally:
        if ours:
            policy.unlink()
    return "installed"


def down(directory: Path) -> None:
    """Stop the cluster in `directory` and delete that. Raises InputError if it is not one of ours."""
    conf = directory / "slurm.conf"
    if not conf.exists() or "throw-away cluster" not in conf.read_text():
        raise InputError(f"no throw-away cluster in {directory}")
    Cluster(directory).stop()


def main() -> None:
    default = Path(__file__).resolve().parents[2] / ".cluster"
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="A throw-away Slurm.")
    parser.add_argument("action", choices=("install", "up", "down"))
    parser.add_argument("--dir", type=Path, default=default, help="the cluster's directory (%(default)s)")
    args = parser.parse_args()
    if args.action == "install":
        print(install())
    elif args.action == "up":
        begun = time.monotonic()
        cluster = Cluster.start(args.dir)
        print(f"Slurm is up in {time.monotonic() - begun:.1f} s: 2 nodes, {GPUS} fake GPUs each. To use it:")
        print(f"  export SLURM_CONF={cluster.env['SLURM_CONF']}")
    else:
        down(args.dir)
        print(f"the cluster is down and {args.dir} removed")


if __name__ == "__main__":
    cli(main)
