"""Every command of the README, typed as it stands there, in order, on a real Slurm and tiny settings."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.clone import clone, environ
from tests.cluster import Cluster
from tests.test_events import tags, tensorboard
from utils import checkpoint
from utils.paths import ROOT

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
ELSEWHERE = {  # typed by others
    "make demo\nmake test\n",  # tests/test_demo.py, and whoever runs this test
    *(block for block in BLOCKS if "--cluster tpu" in block or "--device xla" in block),  # tests/test_tpu_launch.py
}
# What a small cluster's user would edit: the resources in the headers, and which chain is the default one.
HEADER = {"gpus-per-node": "0", "ntasks-per-node": "1", "cpus-per-task": "1", "mem": "4G", "time": "00:10:00"}
(SERVED,) = (block for block in BLOCKS if block.startswith("tensorboard "))  # until it is stopped
EPOCHS = {"pretrain": 1, "r1": 1, "r2": 2, "r3": 3}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """A clone whose reference chain is tiny, with a little data where the README expects it."""
    root = clone(tmp_path_factory.mktemp("readme"))
    for script in root.glob("slurm/*_*.slurm"):
        text = script.read_text()
        for option, value in HEADER.items():
            text = re.sub(rf"(?m)^#SBATCH --{option}=.*$", f"#SBATCH --{option}={value}", text)
        script.write_text(text)
    for file in (root / "ssl_train/configs/demo.yaml", *root.glob("detect_train/configs/demo_r*.yaml")):
        stage = file.stem.removeprefix("demo_") if "_" in file.stem else "pretrain"
        file.write_text(re.sub(r"(?m)^epochs: .*$", f"epochs: {EPOCHS[stage]}", file.read_text()))
    demo, chain = root / "jobs/demo.yaml", root / "jobs/chain.yaml"
    for stage, config in re.findall(r"^  (\w+): \{config: (.*)\}$", demo.read_text(), re.MULTILINE):
        chain.write_text(re.sub(rf"(  {stage}:\n    module: .*\n    config: ).*", rf"\g<1>{config}", chain.read_text()))
    (root / "jobs/mine.yaml").write_text(demo.read_text().replace("name: demo", "name: mine"))
    amounts = ["--unlabeled", "64", "--training", "24", "--validation", "8", "--size", "96"]
    run(root, cluster, f".venv/bin/python -m utils.sample_data data/demo {' '.join(amounts)}")
    return root


def run(root: Path, cluster: Cluster, script: str) -> str:
    """Type `script` in a shell on the login node."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=root, env=environ(**cluster.env), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}"
    return done.stdout


def until_idle(cluster: Cluster) -> None:
    end = time.monotonic() + 400
    while cluster.run("squeue", "-h").stdout.strip():
        assert time.monotonic() < end, cluster.run("squeue").stdout
        time.sleep(1)


@pytest.mark.slurm
def test_every_command_works_as_it_stands(here: Path, cluster: Cluster) -> None:
    outputs = {}
    activated = ""  # each block is a shell of its own; a newcomer has one
    for block in BLOCKS:
        if block in ELSEWHERE:
            continue
        if block == SERVED:
            command = ["bash", "-c", f"{activated}exec {block}"]
            with tensorboard(command, here / "tensorboard.log", cwd=here, env=environ(**cluster.env)) as asked:
                assert {"pretrain/tensorboard", "r1/tensorboard"} <= tags(asked, "images").keys()
            continue
        outputs[block] = run(here, cluster, activated + block)
        until_idle(cluster)
        if "activate" in block:
            activated = "source .venv/bin/activate\n"
    output = "\n".join(outputs.values())
    table = run(here, cluster, f"{activated}python jobs/launch.py --status")
    assert re.findall(r"(?m)^\w+ +DONE ", table) == [
        f"{s:<8}  DONE " for s in ("pretrain", "r1", "r2", "r3", "eval")
    ], table
    reports = [
        path for chain in ("mocov2_fpn", "by_hand", "laptop", "alone") for path in here.glob(f"runs/{chain}/eval/*.out")
    ]
    assert len(reports) == 4
    assert all(path.read_text().rstrip().endswith("# end of report") for path in reports)
    assert all(path.name in output for path in reports), "evaluate.report lists them"
    pages = [here / "runs/mocov2_fpn/report.html", here / "runs/by_hand/report.html", here / "report.html"]
    assert all("compute" in page.read_text() for page in pages), "the first two were made by the last job"
    assert re.search(r"(?m)^AP50 ", outputs[next(block for block in BLOCKS if "evaluate.compare" in block)])
    config = (here / "runs/by_hand/r2/config.yaml").read_text()
    assert "lr: 0.001" in config, "extra arguments pass through sbatch"


@pytest.mark.slurm
def test_chain_slurm_queues_the_five_stages(here: Path, cluster: Cluster) -> None:
    assert "`bash slurm/chain.slurm --file jobs/mine.yaml`" in (ROOT / "README.md").read_text()
    output = run(here, cluster, "bash slurm/chain.slurm --file jobs/mine.yaml")
    jobs = re.findall(r"job (\d+)", output)
    assert [cluster.wait(job, timeout=300) for job in jobs] == ["COMPLETED"] * 5
    assert list(here.glob("runs/mine/eval/eval_*.out"))


@pytest.mark.slurm
def test_two_nodes_train_one_detector(here: Path, cluster: Cluster) -> None:
    run(
        here,
        cluster,
        "source .venv/bin/activate\npython -m jobs.worker pretrain --file jobs/demo.yaml --name two_nodes",
    )
    words = "--name two_nodes --dataset-root data/demo/labeled.sqsh"
    run(here, cluster, f"sbatch --wait --nodes=2 slurm/demo_mocov2_fpn_r1.slurm {words}")
    saved = checkpoint.read(here / "runs/two_nodes/r1/checkpoints/best.pth")
    assert (saved["conditions"]["world_size"], saved["step"]) == (2, 24 // 4)
    assert {path.name.rpartition("_")[2] for path in (here / "runs/two_nodes/r1/logs").glob("*.log")} == {
        "rank0.log",
        "rank1.log",
    }
