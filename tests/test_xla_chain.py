"""A chain on XLA in VMs that are taken away: data from a bucket, results in it, the real programs throughout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.gcs_server import Server, gcs, hasty
from tests.ranks import XLA
from tests.test_tpu import TpuCheckout
from utils.metrics import read
from utils.paths import ROOT
from utils.sample_data import LABELED, UNLABELED, Sample, make

pytest.importorskip("torch_xla", reason="torch_xla has an environment of its own: make install-tpu")

__all__ = ["gcs", "hasty"]  # fixtures
CHAIN = """
base: demo_dense.yaml
name: mine
store: gs://bucket/relay
tpu: {zone: us-central2-b, accelerator: v4-8, version: tpu-ubuntu2204-base, spot: true}
overrides:
  data: {unlabeled: gs://bucket/data/unlabeled.sqsh, labeled: gs://bucket/data/labeled.sqsh}
"""
SMALL = [
    "pretrain.epochs=1", "r1.epochs=2", "r2.epochs=3", "r3.epochs=4", "model.min_size=[64]", "model.max_size=64",
    "pretrain.augment.image_size=32", "pretrain.batch_size=16", "checkpoint.every_minutes=0",
]  # fmt: skip


class RealCheckout(TpuCheckout):
    standins: ClassVar = {}
    patience = 1500.0


@pytest.fixture
def here(tmp_path: Path, gcs: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[RealCheckout]:
    make(tmp_path / "data", Sample(unlabeled=32, training=8, validation=3, size=64))
    for name in (UNLABELED, LABELED):
        gcs.put(f"data/{name}", (tmp_path / "data" / name).read_bytes())
    for variable, value in XLA.items():
        monkeypatch.setenv(variable, value)
    checkout = RealCheckout(tmp_path)
    for name in ("ssl_train", "detect_train", "evaluate"):
        shutil.copytree(ROOT / name, checkout.root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout.root / "jobs/mine.yaml").write_text(CHAIN)
    yield checkout
    checkout.google.kill()


def test_a_chain_whose_vm_is_preempted_twice_ends_with_the_report_here(here: RealCheckout, gcs: Server) -> None:
    here.google.want(
        ssh=[
            ["jobs.worker r1", "checkpoint_0000.pth saved", "preempt"],
            ["jobs.worker r3", "XLA has compiled", "preempt"],
        ]
    )
    done = here.launched("--chain", *SMALL)
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("is PREEMPTED; it goes on from") == 2
    assert "it goes on from checkpoint_0000.pth" in done.stdout
    begun = [call for call in here.google.calls() if "jobs.worker" in call[-3]]
    assert len(begun) == 7  # five stages, two of them twice
    assert re.search(r"r1 +DONE", done.stdout) and " Average Precision  (AP) @[ IoU=0.50:0.95" in done.stdout
    runs = here.root / "runs/mine"
    (report,) = runs.glob("eval/eval_*.out")
    assert "# device: XLA CPU" in report.read_text() and report.read_text().endswith("# end of report\n")
    for stage, epochs in (("r1", [0, 1]), ("r2", [2]), ("r3", [3])):
        lines = [line for line in read(runs / stage / "metrics.jsonl") if line["kind"] == "val"]
        assert [line["epoch"] for line in lines] == epochs
    assert gcs.count("read")["data/labeled.sqsh"] >= 1
