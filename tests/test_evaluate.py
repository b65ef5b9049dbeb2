"""The evaluation program, from a checkpoint and a folder to its report."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

from detect_train import model as detector
from detect_train.data import DetectionImages
from detect_train.inference import predict
from evaluate import analysis, config, detections_file, report, run
from tests import ranks
from utils import attempts, checkpoint, coco, coco_backends, env, goodput, images, labels, optim
from utils.engine import TrainState
from utils.errors import InputError, Stopped
from utils.paths import RunDir
from utils.tree import Folder

CLASSES = ["cat", "cup or mug", "dog"]
ARCHITECTURE: dict[str, Any] = {
    "num_classes": 4, "backbone": "resnet18", "trainable_layers": 5, "norm": "train", "min_size": [64],
    "max_size": 96, "anchor_sizes": [16, 24, 32, 48, 64], "proposals_train": 20, "proposals_test": 60,
    "box_batch_size": 16, "score_threshold": 0.0, "detections_per_image": 60,
}  # fmt: skip


def write_example(root: Path, number: int, objects: list[tuple[list[float], str]]) -> torch.Tensor:
    """A noise image of one of two sizes, with its label file; returned as (3, H, W) uint8."""
    folder = root / "validation"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    width, height = (80, 64) if number % 2 else (64, 64)
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / f"{number}.JPEG")
    content = {
        "bboxes": [box for box, _ in objects],
        "labels": [name for _, name in objects],
        "image_size": [width, height],
    }
    (folder / "labels" / f"{number}.yml").write_text(yaml.safe_dump(content))
    written = (folder / "images" / f"{number}.JPEG").read_bytes()
    return torch.from_numpy(np.array(images.decode(written, "a test's image"))).permute(2, 0, 1)


def save(path: Path, kind: str, model: torch.nn.Module, **extra: Any) -> Path:
    optimizer = optim.sgd(model, lr=0.1, momentum=0.9, weight_decay=0)
    state = TrainState(model=model, optimizer=optimizer, epoch=7, step=70)
    saved_config = {"backbone": "/gone/backbone.pth"}
    content = checkpoint.payload(
        kind, state=state, architecture=ARCHITECTURE, config=saved_config, conditions={}, **extra
    )
    checkpoint.write(path, content)
    return path


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector's checkpoint, as `detect_train` saves it."""
    torch.manual_seed(0)
    model = detector.build(**ARCHITECTURE)
    return save(tmp_path_factory.mktemp("r3") / "best.pth", "detector", model, classes=CLASSES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, best: Path) -> Path:
    """Five images, one a negative. The boxes are near the detector's own, so that it finds some of them."""
    root = tmp_path_factory.mktemp("data") / "labeled"
    model, _ = detector.from_checkpoint(checkpoint.read(best))
    model.eval()
    for number in range(30001, 30006):
        image = write_example(root, number, [])
        if number == 30003:
            continue
        with torch.no_grad():
            (found,) = model([image])
        objects = []
        for label in (1, 3):
            for box in found["boxes"][found["labels"] == label][:6:3]:
                objects.append((box.round().tolist(), CLASSES[label - 1]))
        write_example(root, number, objects)
    return root


def arguments(run_dir: Path, checkpoint_path: Path, root: Path) -> list[str]:
    return [
        "--run-dir", str(run_dir), "--checkpoint-path", str(checkpoint_path), "--dataset-root", str(root),
        "--workers", "0", "device=cpu", "precision=float32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, best: Path, dataset: Path) -> dict[str, Any]:
    """What `main` returns in one process, which may use two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    result = run.main(arguments(tmp_path_factory.mktemp("alone"), best, dataset))
    torch.set_num_threads(threads)
    return result


def test_the_times_of_an_evaluation_add_up(finished: dict[str, Any]) -> None:
    run_dir = RunDir(finished["outputs"]["report"].parent)
    spent = goodput.stage(run_dir, None)
    assert (spent.seconds.keys(), spent.problems) == ({"start-up", "staging", "labels", "evaluation"}, ())
    (times,) = map(json.loads, (file.read_text() for file in run_dir.times.iterdir()))
    assert times["ended"] and times["unsaved"].get("evaluation", 0) < times["seconds"]["evaluation"]
    assert "data.split,validation\n" in run_dir.hyperparam.read_text()


def test_report_holds_the_numbers_of_pycocotools_and_where_they_come_from(
    finished: dict[str, Any], best: Path, dataset: Path, tmp_path: Path
) -> None:
    out, metrics = finished["outputs"]["report"], finished["outputs"]["metrics"]
    assert out.name == f"eval_{env.job_id()}.out"
    result = report.parse(out.read_text(), "report")
    assert result == json.loads(metrics.read_text())
    assert result is not None
    index = labels.load(Folder(dataset), "validation", classes=CLASSES, on_error="error", cache=tmp_path / "index.npz")
    model, _ = detector.from_checkpoint(checkpoint.read(best))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dataset_ = DetectionImages(index, flip=False)
    rows = predict(model, dataset_, batch_size=2, workers=0, device=torch.device("cpu"), precision="float32")
    torch.set_num_threads(threads)
    expected = coco.evaluate(index, rows)
    assert result["stats"] == finished["metrics"] == expected.stats
    assert 0 < result["stats"]["AP"] < 1
    assert result["per_class"] == expected.per_class
    text = out.read_text()
    assert f"\n{expected.table}\n" in text
    assert " cup or mug  n/a\n" in text
    for line in (
        f"checkpoint: {best}",
        f"data: {dataset}",
        "epoch: 6",
        "images: 5",
        "skipped: 0",
        "world_size: 1",
        "evaluator: hotcoco",
    ):
        assert f"# {line}\n" in text
    assert "min_size [64]" in text
    kept = detections_file.load(finished["outputs"]["detections"])
    assert kept.detections.tobytes() == rows.tobytes()
    assert (kept.boxes.tolist(), kept.fingerprint) == (index.boxes.tolist(), Folder(dataset).fingerprint)
    assert kept.names[0] == "validation/images/30001.JPEG"
    assert analysis.stats(kept) == expected.stats
    assert out.with_suffix(".err").read_text() == ""
    assert (result["device"], torch.get_num_threads()) == ("CPU, threads: 1", threads)


def test_both_evaluators_report_the_same(
    finished: dict[str, Any], best: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*arguments(tmp_path, best, dataset), "--evaluator"]
    before = finished["outputs"]["report"].read_text()
    expected = report.parse(before, "before")
    coco_backends.library.cache_clear()  # as in a new process
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    out = run.main([*given, "pycocotools"])["outputs"]["report"]
    result = report.parse(out.read_text(), "after")
    assert expected is not None and result is not None
    assert (expected["evaluator"], result["evaluator"]) == ("hotcoco", "pycocotools")
    assert "hotcoco" in expected["versions"] and "pycocotools" in result["versions"]
    for name in ("stats", "per_class"):
        assert result[name] == expected[name]
    lines = [text[text.index(" Average") : text.index("# result")] for text in (before, out.read_text())]
    assert lines[0] == lines[1]
    (log,) = (tmp_path / "logs").iterdir()
    assert "report: " in log.read_text() and "hotcoco" not in log.read_text()  # not even looked for
    monkeypatch.setattr(run, "predict", None)  # it ends before
    with pytest.raises(InputError, match=r"evaluator=hotcoco: .*install hotcoco, or set evaluator=pycocotools"):
        run.main([*given, "hotcoco"])
    with pytest.raises(InputError, match=r"evaluator.*hotcoco.*pycocotools"):
        run.main([*given, "cocotools"])


def test_two_ranks_report_the_numbers_of_one(
    finished: dict[str, Any], best: Path, dataset: Path, tmp_path: Path
) -> None:
    answer = ranks.torchrun(2, "-m", "evaluate.run", *arguments(tmp_path, best, dataset))
    assert answer.returncode == 0, answer.stderr
    (out,) = tmp_path.glob("eval_*.out")
    assert len(detections_file.load(tmp_path / "detections.npz").ids) == 5
    together = report.parse(out.read_text(), "report")
    assert together is not None
    assert (together["world_size"], together["images"]) == (2, 5)
    assert together["stats"] == pytest.approx(finished["metrics"], abs=1e-12)
    assert answer.stdout.count("Average Precision") == 6
    assert str(out) in answer.stdout


def test_what_skip_leaves_out_is_listed_and_counted(best: Path, tmp_path: Path) -> None:
    for number, name in ((1, "dog"), (2, "unicorn"), (3, "cat")):
        write_example(tmp_path / "data", number, [([2.0, 2.0, 30.0, 40.0], name)])
    (tmp_path / "data" / "validation" / "images" / "3.JPEG").write_bytes(b"no image")
    given = arguments(tmp_path / "run", best, tmp_path / "data")
    with pytest.raises(InputError, match="unicorn"):
        run.main(given)
    (tmp_path / "run" / f"eval_{env.job_id()}.err").unlink()
    out = run.main([*given, "data.on_error=skip"])["outputs"]["report"]
    left_out = out.with_suffix(".err").read_text().splitlines()
    assert f"# skipped: {len(left_out)}\n" in out.read_text()
    assert all(line.startswith("left out: ") for line in left_out)
    assert any("unicorn" in line for line in left_out)
    assert any("3.JPEG" in line for line in left_out)


def test_a_failed_evaluation_leaves_its_cause_and_no_report(best: Path, dataset: Path, tmp_path: Path) -> None:
    stale = tmp_path / f"eval_{env.job_id()}.out"
    stale.write_text("of this job, before it was requeued")
    with pytest.raises(InputError, match="testing"):
        run.main([*arguments(tmp_path, best, dataset), "--dataset-split", "testing"])
    assert not list(tmp_path.glob("*.out"))
    assert not (tmp_path / "metrics.json").exists()
    assert stale.with_suffix(".err").read_text().startswith("rank 0: ERROR 2: ")
    assert "testing" in stale.with_suffix(".err").read_text()


class Pretraining(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_q = torchvision.models.resnet18(num_classes=8)


def backbones(folder: Path) -> dict[str, Path]:
    resnet = torchvision.models.resnet18()
    plain = {name: value for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
    published = {f"module.encoder_q.{name}": value for name, value in resnet.state_dict().items()}
    checkpoint.write(folder / "backbone.pth", plain)
    checkpoint.write(folder / "moco.pth.tar", {"epoch": 100, "arch": "resnet18", "state_dict": published})
    save(folder / "checkpoint_0006.pth", "moco", Pretraining())
    return {path.name: path for path in folder.iterdir()}


def test_files_that_hold_no_detector_are_refused_by_name(tmp_path: Path) -> None:
    files = backbones(tmp_path)
    assert len(files) == 3
    for path in files.values():
        with pytest.raises(InputError, match=f"{path.name} is a backbone only: .*detect_train"):
            run.detector.load(path)
    checkpoint.write(tmp_path / "other.pth", {"weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"other\.pth: not a checkpoint of this project"):
        run.detector.load(tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"gone\.pth: no such file"):
        run.detector.load(tmp_path / "gone.pth")


def test_weights_that_are_not_finite_are_refused(best: Path, tmp_path: Path) -> None:
    content = checkpoint.read(best)
    content["model"]["rpn.head.bbox_pred.bias"][0] = torch.nan
    checkpoint.write(tmp_path / "nan.pth", content)
    with pytest.raises(InputError, match=r"nan\.pth: 1 tensors are not finite, first rpn\.head\.bbox_pred\.bias"):
        run.detector.load(tmp_path / "nan.pth")


def test_a_detector_whose_scores_overflow_gets_no_report(
    best: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = checkpoint.read(best)
    content["model"]["roi_heads.box_predictor.cls_score.weight"][:] = 3e38
    checkpoint.write(tmp_path / "wild.pth", content)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(InputError, match=r"wild\.pth: the detector's scores or boxes are not finite"):
            run.main(arguments(tmp_path, tmp_path / "wild.pth", dataset))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    (err,) = tmp_path.glob("eval_*")
    assert err.suffix == ".err"
    assert err.read_text().startswith(f"rank 0: ERROR 2: {tmp_path / 'wild.pth'}: the detector's scores or boxes")
    assert not (tmp_path / "metrics.json").exists()


def test_command_line_refuses_a_backbone_with_exit_code_2(dataset: Path, tmp_path: Path) -> None:
    path = backbones(tmp_path)["backbone.pth"]
    answer = ranks.run([sys.executable, "-m", "evaluate.run", *arguments(tmp_path / "run", path, dataset)])
    assert answer.returncode == 2
    assert answer.stderr.endswith(f"ERROR 2: {path} is a backbone only: train a detector on it first (detect_train)\n")
    assert [file.suffix for file in (tmp_path / "run").glob("eval_*")] == [".err"]


def test_configuration_files_are_complete_and_problems_come_together() -> None:
    for file in sorted(config.DEFAULT.parent.glob("*.yaml")):
        given = ["--config", str(file), "--run-dir", "r", "--checkpoint-path", "c.pth", "--dataset-root", "d"]
        cfg = config.parse(given)
        assert (cfg.checkpoint, cfg.data.labeled, cfg.data.split) == ("c.pth", "d", "validation")
    assert config.parse([*given, "--batch-size", "5"]).batch_size == 5
    assert config.parse(given).evaluator == "auto"
    with pytest.raises(InputError, match=r"(?s)batch_size=0.*workers=-1"):
        config.parse([*given, "--batch-size", "0", "workers=-1"])
    with pytest.raises(InputError, match=r"(?s)run_dir: required.*checkpoint: required.*data\.labeled: required"):
        config.parse([])


def test_a_signal_ends_it_without_a_report(
    tmp_path: Path, best: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(*given, **options)

    monkeypatch.setattr(run, "predict", signalled)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after 1 of \d batches"):
        run.main(arguments(tmp_path, best, dataset))
    assert not list(tmp_path.rglob("eval_*")) and not list(tmp_path.rglob("metrics.json"))
    ((stopped,), _) = attempts.read(RunDir(tmp_path))
    assert 0 < stopped.seconds["evaluation"] == pytest.approx(stopped.unsaved["evaluation"])
