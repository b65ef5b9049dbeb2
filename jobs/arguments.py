"""The launcher's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.errors import InputError
from utils.paths import CHAIN_FILE


def parse(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the launcher is asked for; --help and unknown flags end the process. Raises: InputError."""
    parser = argparse.ArgumentParser(
        prog="jobs/launch.py",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--chain", action="store_true", help="run all stages that are not done")
    add("--from", dest="start", metavar="STAGE", help="run this stage and what depends on it, again if done")
    add("--only", "--stage", metavar="STAGE", help="run this stage, again if done")
    add("--status", action="store_true", help="show how far the chain is")
    add("--all", action="store_true", help="with --status: a line for each chain under runs/")
    add("--watch", action="store_true", help="show it again and again, until the chain ends")
    add("--logs", metavar="STAGE", help="show what a stage has said, over all its restarts")
    add("-f", "--follow", action="store_true", help="with --logs: and what it says from now on, until it ends")
    add("--cancel", action="store_true", help="cancel the chain's jobs")
    add("--dry-run", action="store_true", help="print scripts and dependencies, change nothing")
    add("--cluster", choices=("slurm", "local", "debug", "tpu"), help="debug: everything inside this process")
    add("--name", help="chain name: runs/NAME/ (default: the chain file's)")
    add("--file", type=Path, default=CHAIN_FILE, help="chain file (default: jobs/chain.yaml)")
    add("--store", metavar="URL", help="mirror run directories there, gs://bucket/folder (default: the chain file's)")
    add("--device", metavar="NAME", help="short for device=NAME, where a stage runs; --cluster tpu is --device xla")
    add("--ranks", type=int, default=1, help="local: processes of a stage (default: %(default)s)")
    add("--sbatch", action="append", default=[], metavar="OPTION",
        help="--sbatch=--mem=8G: an sbatch option over every stage's header; may be repeated")  # fmt: skip
    add("words", nargs="*", metavar="key=value", help="configuration, see above")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.all and not arguments.status:
        raise InputError("--all: only with --status")
    if arguments.all and arguments.watch:
        raise InputError("--watch: shows one chain; leave out --all")
    if arguments.follow and not arguments.logs:
        raise InputError("-f: only with --logs STAGE")
    if arguments.logs and (arguments.status or arguments.watch):
        raise InputError("--logs: leave out --status and --watch")
    arguments.status |= arguments.watch
    if arguments.words and (arguments.status or arguments.logs or arguments.cancel):
        raise InputError(f"{arguments.words[0]}: nothing to configure here; --name or --file says which chain")
    device = "xla" if arguments.cluster == "tpu" else arguments.device
    if arguments.device not in (None, device):
        raise InputError(f"--device {arguments.device}: the chips of --cluster tpu are xla")
    if device:
        arguments.words.append(f"device={device}")
    return arguments
