"""What an evaluation can be told; the values are in configs/eval.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import config
from utils.coco_names import Evaluator
from utils.shared_config import DeviceName, OnError, Precision, Stage

DEFAULT = Path(__file__).parent / "configs" / "eval.yaml"
FLAGS = {
    "--checkpoint-path": "checkpoint",
    "--dataset-root": "data.labeled",
    "--dataset-split": "data.split",
    "--batch-size": "batch_size",
    "--workers": "workers",
    "--evaluator": "evaluator",
    "--run-dir": "run_dir",
}


@dataclass(frozen=True, kw_only=True)
class Data:
    labeled: str  # squashfs archive or folder of the labelled set
    stage: Stage  # read the archive where it is, or copied whole; unpack it; mount it by squashfuse
    split: str  # folder in it: training or validation
    on_error: OnError  # unusable images and labels: list them and end, or leave them out


@dataclass(frozen=True, kw_only=True)
class Config:
    run_dir: str  # where the report goes
    checkpoint: str  # a detector's checkpoint; classes, architecture and image sizes come from it
    data: Data
    batch_size: int  # images in one forward pass of one rank
    workers: int  # loader processes of each rank; 0: none
    device: DeviceName
    precision: Precision  # auto: bf16 where the hardware computes in it
    evaluator: Evaluator  # who computes COCO's numbers, which are the same; auto: hotcoco where it can be imported
    collective_timeout: float  # seconds without an answer after which a rank or loader process counts as lost

    def problems(self) -> list[str]:
        found = []
        if self.batch_size < 1:
            found.append(f"batch_size={self.batch_size}: at least 1")
        if self.workers < 0:
            found.append(f"workers={self.workers}: 0 or more")
        if not self.collective_timeout > 0:
            found.append(f"collective_timeout={self.collective_timeout}: above 0")
        return found


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line. Raises: InputError listing every problem."""
    line = config.parser("evaluate.run", FLAGS, DEFAULT, "Evaluate a detection checkpoint by COCO's rules.")
    return config.parse(Config, line, argv)
