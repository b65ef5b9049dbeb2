"""Chains of stand-in stages on a throw-away Slurm: how tests queue them and look at them."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.checkout import STAGES, Checkout
from tests.cluster import Cluster

SMALL = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=500M"]
STANDIN = ["--file", "tests/standin/chain.yaml"]


def launch_small(here: Checkout, *words: str) -> str:
    done = here.launch(*(f"--sbatch={option}" for option in SMALL), *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def jobs(here: Checkout) -> dict[str, str]:
    entries = json.loads((here.root / "runs/standin/jobs.json").read_text())
    return {stage: entry["job_id"] for stage, entry in entries.items()}


def states(here: Checkout) -> list[str]:
    table = here.table()
    return [table[stage].split()[1] for stage in STAGES]


def sbatch(here: Checkout, cluster: Cluster, *words: str) -> str:
    python = here.environ["RELAY_PYTHON"]
    submitted = cluster.run("env", f"RELAY_PYTHON={python}", "sbatch", "--parsable", *words, cwd=here.root)
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def wait_until_running(here: Checkout, stage: str, restarts: int = 0) -> dict[str, Any]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if (marker := here.state(stage))["restarts"] == restarts:
                return marker
        except FileNotFoundError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{stage} does not start")


def described(cluster: Cluster, job: str) -> dict[str, str]:
    shown = cluster.run("scontrol", "-o", "show", "job", job).stdout
    return dict(item.split("=", 1) for item in shown.split() if "=" in item)
