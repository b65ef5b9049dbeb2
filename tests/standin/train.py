"""A stand-in program: its outputs say what they were made from."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.standin.config import parse
from utils import checkpoint_files, env, files, log, stop
from utils.errors import Stopped, cli
from utils.metrics import MetricsWriter
from utils.paths import RunDir


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse(argv)
    run_dir = RunDir(Path(cfg.run_dir))
    rank = env.world().rank
    log.setup(rank, run_dir.rank_log(env.job_id(), env.restarts(), rank))
    if cfg.wait_for:
        _wait(Path(cfg.wait_for), run_dir, rank == 0 and cfg.saves, cfg.save_seconds)
    if rank == cfg.fail_on_rank and cfg.fail == "error":
        raise RuntimeError("the disk\nis on fire")
    if cfg.fail == "disk":
        (run_dir.path / "large").write_bytes(bytes(1 << 30))
    if rank == cfg.fail_on_rank and cfg.fail:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "segv": signal.SIGSEGV}[cfg.fail])
    if cfg.ranks == "meet":
        _meet(run_dir)
    came_from = [Path(path).read_text() for path in (cfg.backbone, cfg.init, cfg.checkpoint) if path]
    text = " ".join([*came_from, f"{run_dir.path.name}:{cfg.optim.lr:g}"])
    outputs = {name: run_dir.path / f"{name}.txt" for name in ("last", "best", "backbone", "report")}
    if rank == 0:
        for path in outputs.values():
            files.write_text(path, text)
        files.write_text(outputs["report"], f"{text}\n Average Precision  (AP) @[ all ] = 0.500\n")
        writer = MetricsWriter(run_dir, epoch=0, step=0)
        writer.write("train", epoch=cfg.epochs - 1, step=7, loss=0.25)
        writer.write("validation", epoch=cfg.epochs - 1, step=7, AP=0.5)
    seen = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "STANDIN_PLACE", "STANDIN_BOX")}
    log.info(f"made {text} with {seen}")
    return {"outputs": outputs, "metrics": {"AP": 0.5}, "epochs": cfg.epochs}


def _wait(file: Path, run_dir: RunDir, saves: bool, save_seconds: float) -> None:
    """Wait for the file; asked to stop, save a checkpoint as a training would."""
    with stop.listening():
        log.info("listening")
        while not file.exists():
            if asked := stop.requested():
                step = len(checkpoint_files.everything(run_dir.checkpoints)) + 1
                time.sleep(save_seconds)
                if saves:
                    files.write_text(run_dir.checkpoints / checkpoint_files.name(0, step), "saved")
                raise Stopped(f"stopped by {asked} after step {step}")
            time.sleep(0.05)


def _meet(run_dir: RunDir) -> None:
    import torch

    from utils import dist

    with dist.session("cpu", run_dir, timeout=60):
        mean = dist.mean(torch.tensor([float(dist.rank())])).item()
        log.info(f"rank {dist.rank()} of {dist.size()}: mean {mean}")
        if dist.rank() == 0:
            files.write_json(run_dir.path / "ranks.json", {"size": dist.size(), "mean": mean})


if __name__ == "__main__":
    cli(main)
