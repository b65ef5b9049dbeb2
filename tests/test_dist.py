"""Ranks as real processes: torchrun's rendezvous, and ours from a Slurm step's variables."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.distributed import TCPStore

from tests.gcs_server import Fault, Server, gcs
from tests.ranks import run, torchrun
from utils import files, manifest
from utils.paths import RunDir

__all__ = ["gcs"]  # a fixture

PROGRAM = """
import sys
from pathlib import Path
import torch
from utils import dist
from utils.paths import RunDir
with dist.session("cpu", RunDir(Path(sys.argv[1])), timeout=60):
    mine = torch.arange(dist.rank() + 1.0) + 10 * dist.rank()
    assert dist.agree(f"of {dist.rank()}") == "of 0"
    assert dist.gather_rows(torch.empty(0, 3)).shape == (0, 3)
    alike = dist.gather(torch.full((2, 1), dist.rank()))
    assert alike.flatten().tolist() == [rank for rank in range(dist.size()) for _ in range(2)]
    mean = dist.mean(torch.tensor([float(dist.rank())]))
    print(f"rank {dist.rank()} of {dist.size()}: {dist.gather_rows(mine).tolist()} {mean.item()}", flush=True)
"""


def step(rank: int, size: int, job: str) -> dict[str, str]:
    """The variables srun gives one task."""
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    }  # fmt: skip


def test_torchrun_ranks_meet_and_gather_rows(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    result = torchrun(2, tmp_path / "program.py", tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert f"rank {rank} of 2: [0.0, 10.0, 11.0] 0.5" in result.stdout


def test_one_process_is_the_same_code(tmp_path: Path) -> None:
    result = run([sys.executable, "-c", PROGRAM, tmp_path])
    assert result.stdout.endswith("\nrank 0 of 1: [0.0] 0.0\n"), result.stderr


def test_two_slurm_jobs_at_once_on_one_node_do_not_meet(tmp_path: Path) -> None:
    expected = {"41": "[0.0, 10.0, 11.0]", "42": "[0.0, 10.0, 11.0, 20.0, 21.0, 22.0]"}
    ranks = [(job, size, rank) for job, size in (("41", 2), ("42", 3)) for rank in range(size)]
    with ThreadPoolExecutor(len(ranks)) as pool:
        results = pool.map(
            lambda job, size, rank: run([sys.executable, "-c", PROGRAM, tmp_path / job], step(rank, size, job)),
            *zip(*ranks, strict=True),
        )
    for (job, size, rank), result in zip(ranks, results, strict=True):
        assert result.returncode == 0, result.stderr
        assert f"rank {rank} of {size}: {expected[job]}" in result.stdout


def test_a_rank_that_meets_another_run_on_its_port_is_refused(tmp_path: Path) -> None:
    stranger = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    stranger.set("token", "of another run")
    file = RunDir(tmp_path).rendezvous("43", "0", 0)
    files.write_json(file, {"host": "127.0.0.1", "port": stranger.port, "token": "ours"})
    result = run([sys.executable, "-c", PROGRAM, tmp_path], step(1, 2, "43"))
    assert result.returncode != 0
    assert f"belongs to another run; see {file}" in result.stderr


RESUMED = """
import hashlib, sys, torch
from pathlib import Path
from utils import dist
from utils.paths import RunDir
folder, first = Path(sys.argv[1]), int(sys.argv[2])
with dist.session("cpu", RunDir(folder), timeout=60) as device:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(400, 400) for _ in range(4)))  # more than a bucket of gradients
    if first:
        model.load_state_dict(torch.load(folder / f"{first}.pth", weights_only=True))
    parallel = dist.parallel(model, device)
    for step in range(first, 3):
        torch.manual_seed(10 * step + dist.rank())
        model.zero_grad()
        parallel(torch.randn(8, 400)).square().mean().backward()
        for weights in model.parameters():
            weights.data -= weights.grad
        if dist.rank() == 0:
            torch.save(model.state_dict(), folder / f"{step + 1}.pth")
    total = hashlib.sha256(b"".join(weights.detach().numpy().tobytes() for weights in model.parameters()))
    print(total.hexdigest() if dist.rank() == 0 else "")
"""


def test_gradients_of_three_ranks_are_summed_alike_in_the_first_step_and_later(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(RESUMED)
    whole, resumed = (torchrun(3, tmp_path / "program.py", tmp_path, first) for first in (0, 1))
    assert (whole.returncode, resumed.returncode) == (0, 0), whole.stderr + resumed.stderr
    digests = [re.search(r"[0-9a-f]{64}", done.stdout) for done in (whole, resumed)]
    assert digests[0] and digests[1] and digests[0][0] == digests[1][0]


TIMED = """
import sys
from pathlib import Path
from tests import test_engine
from utils import checkpoint, dist
from utils.paths import RunDir
saved, save = [], checkpoint.save
checkpoint.save = lambda run_dir, content: saved.append(content["step"]) or save(run_dir, content)
run = Path(sys.argv[1])
with dist.session("cpu", RunDir(run), timeout=60):
    test_engine.train(test_engine.new_state(), run, 2, every_minutes=1e-9)
    print(f"rank {dist.rank()} saved at {saved}", flush=True)
"""


def test_ranks_save_together_and_once_when_it_is_time(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TIMED)
    done = torchrun(2, tmp_path / "program.py", tmp_path)
    assert done.returncode == 0, done.stderr
    # every second step: one to ask for it; and after each epoch of three
    assert "rank 0 saved at [2, 3, 5, 6]" in done.stdout and "rank 1 saved at []" in done.stdout


UPLOADS = """
import sys
from pathlib import Path
from tests import test_engine
from utils import dist
from utils.errors import EnvironmentProblem
from utils.paths import RunDir
run = RunDir(Path(sys.argv[1]), sys.argv[2])
with dist.session("cpu", run, timeout=8):
    try:
        test_engine.train(test_engine.new_state(), run.path, 1)
    except EnvironmentProblem as error:
        print(f"rank {dist.rank()}: {error}", flush=True)
        raise
"""
URL = "gs://bucket/relay/mine/r1"


def test_an_upload_may_take_longer_than_ranks_wait_for_each_other(gcs: Server, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(UPLOADS)
    gcs.faults = [Fault("write", r".*\.pth", first=1, seconds=12)]
    done = torchrun(2, tmp_path / "program.py", tmp_path / "run", URL)
    assert done.returncode == 0, done.stderr
    saved = re.search(r"checkpoint_0000.pth saved in ([\d.]+) s", done.stdout)
    assert saved and float(saved[1]) > 12
    assert "checkpoints/checkpoint_0000.pth" in manifest.newest(URL).files


def test_an_upload_that_fails_ends_every_rank_with_its_cause(gcs: Server, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(UPLOADS)
    gcs.faults = [Fault("write", r".*\.pth", status=403)]
    done = torchrun(2, tmp_path / "program.py", tmp_path / "run", URL)
    assert done.returncode != 0
    assert sorted(re.findall(r"rank (\d): .*403", done.stdout)) == ["0", "1"], done.stdout + done.stderr
