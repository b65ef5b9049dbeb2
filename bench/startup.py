"""What somebody waits for: --help, queueing a chain, its status, a requeued run's first step.

    python -m bench.startup

Seconds are of wall time, but those of "own time": CPU seconds of the launcher's process, without Slurm's programs,
which it waits for. Rows on Slurm need a throw-away cluster (tests/cluster); without Slurm they are left out.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.measure import Row, arguments, race, report, seconds, wall
from tests.checkout import Checkout
from tests.cluster import Cluster, available
from utils.paths import ROOT

HELP, SUBMISSION, LAUNCH = 0.15, 0.25, 2.0  # limits, seconds
PROGRAMS = ("jobs/launch.py", "jobs.worker", "ssl_train.train", "detect_train.train", "evaluate.run", "evaluate.report")
SMALL = [f"--sbatch={option}" for option in ("--gpus-per-node=0", "--ntasks-per-node=1", "--mem=500M", "--hold")]
CHAIN = ["--file", "tests/standin/chain.yaml"]
OWN = """
import atexit, resource, runpy, sys
def told():
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"own {used.ru_utime + used.ru_stime}", file=sys.stderr)
atexit.register(told)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PRETRAIN = ["model.arch=resnet18", "model.queue=64", "batch_size=32", "augment.image_size=32", "workers=0"]
DETECT = [
    "model.backbone=resnet18", "model.min_size=[64]", "model.max_size=64", "model.anchor_sizes=[8, 16, 32, 64, 96]",
    "model.proposals_train=50", "model.proposals_test=50", "model.box_batch_size=32", "model.norm=train",
    "model.trainable_layers=5", "batch_size=4", "workers=0",
]  # fmt: skip


def python(*argv: str) -> str:
    """What a Python program prints. Raises: CalledProcessError."""
    words = [sys.executable, *argv]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return done.stdout


def under(claim: str, took: float, limit: float) -> Row:
    return Row(claim, f"{took:.3f} s", f"limit {limit:g} s", limit / took, 1.0)


def helps(rounds: int) -> list[Row]:
    """--help of each program beside the import of torch."""
    took: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for program in PROGRAMS:
            words = [program] if "/" in program else ["-m", program]
            took.setdefault(program, []).append(seconds(lambda words=words: python(*words, "--help"), wall))  # type: ignore[misc]
        took.setdefault("torch", []).append(seconds(lambda: python("-c", "import torch"), wall))
    medians = {name: statistics.median(times[1:]) for name, times in took.items()}  # the first round warms up
    torch = medians.pop("torch")
    rows = [
        Row(f"{program} --help", f"{ours:.3f} s", f"import torch: {torch:.2f} s", torch / ours)
        for program, ours in medians.items()
    ]
    return [*rows, under("the slowest of these", max(medians.values()), HELP)]


def launches(folder: Path, rounds: int) -> list[Row]:
    """A chain of five stand-in stages put into the queue of a cluster, held; a hundred chains' status."""
    cluster = Cluster.start(folder / "slurm")
    try:
        here = Checkout(folder, cluster)
        own, took = [], []
        for number in range(rounds):
            words = [*CHAIN, "--name", f"chain{number}"]
            began = wall()
            done = here.run(sys.executable, "-c", OWN, "jobs/launch.py", *words, *SMALL, "--chain")
            took.append(wall() - began)
            own.append(float(re.search(r"^own ([\d.]+)$", done.stdout, re.MULTILINE)[1]))  # type: ignore[index]
        for number in range(rounds, 100):
            shutil.copytree(here.root / "runs/chain0", here.root / f"runs/chain{number}")
        status = [sys.executable, "jobs/launch.py", *CHAIN, "--status"]
        ours, peer, ratio = race(
            lambda: here.run(*status, "--all"),
            lambda: here.run(*status, "--name", "chain0"),
            rounds=rounds,
            clock=wall,
        )
        for number in range(rounds):
            here.run(sys.executable, "jobs/launch.py", *CHAIN, "--name", f"chain{number}", "--cancel")
    finally:
        cluster.stop()
    return [
        under("own time of queueing five stages", statistics.median(own), SUBMISSION),
        under("five stages in the queue", statistics.median(took), LAUNCH),
        Row("status of 100 chains, all at once", f"{ours:.2f} s", f"one by one: {100 * peer:.0f} s", 100 * ratio),
    ]


def resumed(program: str, flags: list[str], folder: Path, rounds: int) -> Row:
    """From the process's start to the first step of a run that goes on, beside the imports that no run can do without.

    Each run trains one more epoch of few steps.
    """
    words = ["-m", program, "--run-dir", str(folder / program), *flags]
    python(*words, "--epochs", "1")
    pairs, shown = [], ""
    for epoch in range(2, 2 + rounds):
        said = re.search(r"first step after ([\d.]+) s: (.*)", python(*words, "--epochs", str(epoch)))
        assert said
        shown = said[2]
        pairs.append((float(said[1]), seconds(lambda: python("-c", "import torch, torchvision"), wall)))
    ours, floor = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{program}, newest run: {shown}", flush=True)
    ratio = statistics.median(floor / took for took, floor in pairs)
    return Row(
        f"{program} resumed, to its first step", f"{ours:.1f} s", f"import torch, torchvision: {floor:.1f} s", ratio
    )


def main() -> None:
    rounds = arguments(__doc__, rounds=3).rounds
    with tempfile.TemporaryDirectory(prefix="relay-") as name:
        folder = Path(name)
        rows = helps(rounds)
        if problem := available():
            print(f"no rows on Slurm: {problem}")
        else:
            rows += launches(folder, rounds)
        made = ["--unlabeled=64", "--training=8", "--validation=4", "--size=64"]
        python("-m", "utils.sample_data", str(folder / "data"), *made)
        data = ["--dataset-root", str(folder / "data" / "unlabeled.sqsh"), "device=cpu"]
        rows.append(resumed("ssl_train.train", [*data, *PRETRAIN], folder, rounds))
        data = ["--dataset-root", str(folder / "data" / "labeled.sqsh"), "device=cpu"]
        rows.append(resumed("detect_train.train", [*data, *DETECT], folder, rounds))
    report("startup", rows)


if __name__ == "__main__":
    main()
