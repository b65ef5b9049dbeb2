"""What an evaluation must not turn into a number: other files, other classes, half of the images, half a report."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detect_train import model as detector
from evaluate import config, report, run
from tests import ranks
from tests.test_coco import make_index, random_case, truth_as_detections
from tests.test_evaluate import ARCHITECTURE, CLASSES, Pretraining, arguments, save, write_example
from utils import checkpoint, checkpoint_files, coco, labels, log
from utils.errors import CheckpointError, InputError
from utils.files import sha256
from utils.paths import RunDir


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = detector.build(**ARCHITECTURE)
    return save(tmp_path_factory.mktemp("r3") / "best.pth", "detector", model, classes=CLASSES)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in (30001, 30002, 30003):
        write_example(tmp_path / "data", number, [([2.0, 2.0, 30.0, 40.0], "cat")])
    return tmp_path / "data"


def test_an_image_of_id_0_counts_like_any_other() -> None:
    index = make_index([1, 2], np.array([[0, 0, 20, 20], [0, 0, 60, 60], [50, 50, 200, 200.0]]), [1, 2, 3])
    index = labels.LabelIndex(**{**vars(index), "ids": np.array([0, 7])})
    assert coco.evaluate(index, truth_as_detections(index)).stats["AP"] == pytest.approx(1, abs=1e-12)
    first = truth_as_detections(index)[:1]
    assert coco.evaluate(index, first).per_class == {"cat": pytest.approx(1), "dog": 0.0, "eel": 0.0, "fox": -1.0}


def edited(best: Path, path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = checkpoint.read(best)
    edit(content)
    checkpoint.write(path, content)
    return path


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one class fewer": (lambda c: c["classes"].pop(), "2 distinct class names expected for num_classes=4"),
    "a class twice": (lambda c: c["classes"].__setitem__(0, "dog"), "3 distinct class names expected"),
    "classes that are numbers": (lambda c: c.update(classes=[1, 2, 3]), "distinct class names expected"),
    "a class of two lines": (lambda c: c["classes"].__setitem__(0, "cat\n# end of report"), "distinct class names"),
    "room for 10 million classes": (lambda c: c["architecture"].update(num_classes=10**7), "num_classes=10000000"),
    "another backbone": (lambda c: c["architecture"].update(backbone="resnet34"), "not those of the architecture"),
    "an unknown backbone": (lambda c: c["architecture"].update(backbone="os"), "not those of the architecture"),
    "an unknown key": (lambda c: c["architecture"].update(shell="rm"), "not those of the architecture"),
    "no key": (lambda c: c["architecture"].pop("norm"), "not those of the architecture"),
    "a weight less": (lambda c: c["model"].popitem(), "not those of the architecture"),
}


@pytest.mark.parametrize(("edit", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_checkpoint_that_contradicts_itself_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, best: Path
) -> None:
    content = checkpoint.read(best)
    assert len(run.detector.build("best.pth", content)[1]) == 3
    edit(content)
    with pytest.raises(InputError, match=rf"other\.pth: .*{message}"):
        run.detector.build("other.pth", content)


def test_a_contradiction_leaves_its_cause_and_no_report(best: Path, data: Path, tmp_path: Path) -> None:
    other = edited(best, tmp_path / "other.pth", lambda c: c["classes"].pop())
    with pytest.raises(InputError, match=r"other\.pth: 2 distinct class names expected for num_classes=4"):
        run.main(arguments(tmp_path / "run", other, data))
    assert [path.suffix for path in (tmp_path / "run").glob("eval_*")] == [".err"]


def refused(given: list[str], cause: str) -> None:
    """The real command ends with exit code 2 and this line, without a report."""
    answer = ranks.run([sys.executable, "-m", "evaluate.run", *given])
    assert answer.returncode == 2, answer.stderr
    assert f"\nERROR 2: {cause}" in f"\n{answer.stderr}", answer.stderr
    assert [path.suffix for path in Path(given[1]).glob("eval_*")] == [".err"]
    assert not (Path(given[1]) / "metrics.json").exists()


def test_the_program_refuses_a_pretraining_checkpoint(data: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint_0006.pth", "moco", Pretraining())
    refused(arguments(tmp_path / "run", path, data), f"{path} is a backbone only: train a detector on it first")


def test_the_program_refuses_weights_that_are_not_finite(best: Path, data: Path, tmp_path: Path) -> None:
    path = edited(best, tmp_path / "nan.pth", lambda c: c["model"]["rpn.head.conv.0.0.bias"].fill_(torch.nan))
    cause = f"{path}: 1 tensors are not finite, first rpn.head.conv.0.0.bias: the training diverged"
    refused(arguments(tmp_path / "run", path, data), cause)


def test_the_program_refuses_labels_of_other_classes(best: Path, data: Path, tmp_path: Path) -> None:
    write_example(data, 30004, [([2.0, 2.0, 30.0, 40.0], "unicorn")])
    line = "  validation/labels/30004.yml: box 0: unknown class 'unicorn'"
    refused(arguments(tmp_path / "run", best, data), f"{data}: 1 unusable images, labels or boxes\n{line}")


def test_a_checkpoint_with_a_flipped_bit_gets_no_number(best: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "best.pth"
    copy.write_bytes(best.read_bytes())
    checkpoint_files.record(copy, sha256(copy))
    assert run.detector.load(copy)["epochs_done"] == 7
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1  # in the weights: torch reads them without a word
    copy.write_bytes(content)
    assert checkpoint.read(copy)["epochs_done"] == 7
    with pytest.raises(CheckpointError, match=r"best\.pth: damaged"):
        run.main(arguments(tmp_path / "run", copy, data))
    assert not list((tmp_path / "run").glob("*.out"))


def test_without_its_last_image_there_is_no_report(best: Path, data: Path, tmp_path: Path) -> None:
    given = arguments(tmp_path / "run", best, data)
    out = run.main(given)["outputs"]["report"]
    assert report.parse(out.read_text(), "x") is not None
    image = data / "validation" / "images" / "30003.JPEG"
    before = image.stat()
    image.write_bytes(b"\0" * before.st_size)  # after it was checked: the index is read from the cache
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"30003\.JPEG: unreadable image"):
        run.main(given)
    assert not out.exists()
    assert "30003.JPEG: unreadable image" in out.with_suffix(".err").read_text()
    answer = ranks.torchrun(2, "-m", "evaluate.run", *given)
    assert answer.returncode != 0 and "30003.JPEG: unreadable image" in answer.stderr
    assert not list((tmp_path / "run").glob("*.out"))


def write_report(folder: Path, saved: dict[str, Any], index: labels.LabelIndex, result: coco.Result) -> None:
    cfg = config.parse(arguments(folder, folder / "best.pth", folder))
    run.write(cfg, RunDir(folder), folder / "best.pth", saved, index, {"evaluator": "hotcoco"}, result)


def die_at_operation(folder: Path, number: int) -> None:
    """Die of SIGKILL at the `number`-th time that a file in `folder` is opened, renamed or linked."""
    done = 0

    def count(event: str, given: tuple[Any, ...]) -> None:
        nonlocal done
        if event in ("open", "os.rename", "os.link") and str(folder) in str(given):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def die_at_byte(folder: Path, number: int) -> None:
    """Let the kernel kill the process once a file has `number` times 200 bytes and would get more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 * number, 200 * number))


@pytest.mark.parametrize("die_at", [die_at_operation, die_at_byte])
def test_a_report_whose_writing_was_killed_is_whole_or_not_there(
    die_at: Callable[[Path, int], None], best: Path, tmp_path: Path
) -> None:
    ends, saved = [], checkpoint.read(best)
    index, rows = random_case(seed=0)
    numbers = coco.evaluate(index, rows)  # here: the evaluator's threads do not outlive a fork
    for number in range(1, 60):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "best.pth").write_bytes(b"weights")
        child = os.fork()
        if child == 0:
            try:
                os.environ["SLURM_JOB_ID"] = "7"
                log.logger.disabled = True
                die_at(folder, number)
                write_report(folder, saved, index, numbers)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        out = folder / "eval_7.out"
        if out.exists():
            result = report.parse(out.read_text(), "x")
            assert result is not None and result["stats"]["AP"] > 0
            assert json.loads((folder / "metrics.json").read_text()) == result
        if ends[-1] == 0:
            break
    assert ends[-1] == 0 and out.exists() and len(ends) > 5
    assert set(ends[:-1]) <= {-signal.SIGKILL, -signal.SIGXFSZ}
