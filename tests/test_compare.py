"""Runs side by side: what is beyond noise, what differs, and the exit code for CI."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluate import compare, compare_text, detections_file, references
from tests.ranks import run
from tests.test_coco import make_index
from utils.coco_names import METRICS
from utils.errors import CheckFailed, InputError
from utils.labels import LabelIndex

BOX = [10.0, 10.0, 50.0, 50.0]
IMAGES = 100


def index_of(images: int = IMAGES, label: int = 1) -> LabelIndex:
    """One object an image, of class `label`."""
    return make_index([1] * images, np.array([BOX] * images), [label] * images)


def save(file: Path, found: int, index: LabelIndex | None = None) -> str:
    """Detections that are right in the first `found` images; returns the path."""
    index = index or index_of()
    rows = [[float(number), *BOX, 0.5, float(label)] for number, label in zip(index.ids, index.labels, strict=True)]
    detections_file.save(file, index, np.array(rows[:found]).reshape(-1, 7))
    return str(file)


def chain(root: Path, found: int, **changes: Any) -> str:
    """A finished chain of two stages: r1, which ran an hour on two GPUs in two attempts, and eval."""
    for stage, config in (("r1", {"optim.lr": 0.03, "epochs": 2}), ("eval", {"checkpoint": "r1.best"})):
        folder = root / stage
        (folder / "times").mkdir(parents=True)
        own = {key: value for key, value in changes.items() if key in config}
        marker = {
            "status": "done",
            "started": "2030-01-01T00:00:00+00:00",
            "ended": "2030-01-01T00:30:00+00:00",
            "config": {"run_dir": str(folder), **config, **own},
            "inputs": {},
            "outputs": {},
        }
        (folder / "state.json").write_text(json.dumps(marker))
    records = [{"kind": "train", "epoch": 0, "step": step, "images_per_s": rate} for step, rate in enumerate((1, 9, 8))]
    (root / "r1" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save(root / "eval" / "detections.npz", found)
    (root / "eval" / "metrics.json").write_text(json.dumps({"stats": dict.fromkeys(METRICS, 0.25)}))
    return str(root)


def spent(root: Path, stage: str, *, ranks: int = 2, began: float = 1000.0, **seconds: float) -> None:
    """An attempt at a stage."""
    parts = {name.replace("_", " "): value for name, value in seconds.items()}
    attempt = {
        "job": "7", "restarts": 0, "world_size": ranks, "device": "GPU X", "cores": 4, "began": began,
        "at": began + sum(parts.values()), "seconds": parts, "unsaved": {}, "ended": True,
    }  # fmt: skip
    (root / stage / "times" / f"7_0_{began:.0f}.json").write_text(json.dumps(attempt))


def by_hand(folder: Path, found: int, checkpoint: str) -> str:
    """An evaluation without the launcher: it has no marker."""
    (folder / "times").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"run_dir: {folder}\ncheckpoint: {checkpoint}\n")
    return str(Path(save(folder / "detections.npz", found)).parent)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    compare.main(words)
    return capsys.readouterr().out


def test_a_difference_is_told_from_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, more, few = (save(tmp_path / f"{found}.npz", found) for found in (40, 60, 42))
    lines = printed(capsys, base, more, few).splitlines()
    assert lines[0] == f"{more} (B) against {base} (A): 100 images of validation, 100 boxes of 4 classes"
    ap = [line for line in lines if line.startswith("AP   ")]
    assert ap[0].split()[:4] == ["AP", "0.406", "0.604", "+0.198"] and ap[0].endswith("beyond noise")
    assert ap[1].split()[:4] == ["AP", "0.406", "0.426", "+0.020"] and ap[1].endswith("within noise")
    small = next(line for line in lines if line.startswith("APs "))
    assert small.split() == ["APs", "n/a", "n/a"]
    assert sum("against" in line for line in lines) == 2
    assert "Configuration" not in "".join(lines)


def test_a_single_run_is_shown_with_its_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, save(tmp_path / "one.npz", 40)).splitlines()
    assert len(lines) == 2 + len(METRICS)
    row = next(line for line in lines if line.startswith("AR100 ")).split()
    assert row[:2] == ["AR100", "0.400"] and float(row[2]) < 0.33 < 0.47 < float(row[4])


def test_classes_are_listed_by_how_much_they_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make_index([3] * 20, np.array([BOX] * 60), [1, 2, 3] * 20)
    truth = np.column_stack([np.repeat(index.ids, 3), index.boxes, np.full(60, 0.5), index.labels])
    detections_file.save(tmp_path / "a.npz", index, truth[(index.labels == 3) | (index.ids.repeat(3) < 30011)])
    detections_file.save(tmp_path / "b.npz", index, truth[index.labels != 2])
    monkeypatch.setattr(compare_text, "MOST_CLASSES", 1)
    lines = printed(capsys, str(tmp_path / "a.npz"), str(tmp_path / "b.npz")).splitlines()
    place = lines.index("AP of classes, 2 of 4 changed")
    assert lines[place + 1].split() == ["dog", "0.505", "0.000", "-0.505"]
    assert lines[place + 2 :] == ["  and 1 more, by 0.495 and more"]


def test_only_what_differs_in_the_configuration_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = chain(tmp_path / "one", 40), chain(tmp_path / "two", 60, **{"optim.lr": 0.01})
    spent(tmp_path / "one", "r1", compute=3600, data_wait=900)
    spent(tmp_path / "one", "eval", evaluation=450)
    lines = printed(capsys, one, two).splitlines()
    place = lines.index("Configuration, A -> B")
    assert lines[place + 1 :] == [
        "  r1 optim.lr  0.03 -> 0.01",
        "",
        "Cost, A and B",
        "  time      2.75 h of GPU X; 1.00 h of the last attempts",
        "  images/s  r1: 8.0; 8.0",
    ]
    assert "Configuration" not in printed(capsys, one, one)
    of_stage = printed(capsys, f"{one}/eval", f"{two}/eval")
    assert "beyond noise" in of_stage and "optim.lr" not in of_stage


def test_ranks_are_paid_for_while_they_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = chain(tmp_path / "one", 40), chain(tmp_path / "two", 60)
    (tmp_path / "one" / "jobs.json").write_text('{"r1": {"submitted": "1970-01-01T00:00:00+00:00"}}')
    spent(tmp_path / "one", "r1", ranks=8, compute=3600)
    spent(tmp_path / "one", "r1", ranks=2, began=90000, compute=1800)  # long after the first, on fewer
    spent(tmp_path / "one", "eval", ranks=1, evaluation=1800)
    assert "  time      9.50 h of GPU X; 1.00 h of the last attempts" in printed(capsys, one, two).splitlines()


def test_evaluations_by_hand_are_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (by_hand(tmp_path / name, 40, f"{name}.pth") for name in ("e1", "e2"))
    assert "time      n/a; n/a" in printed(capsys, one, two)
    spent(tmp_path, "e1", evaluation=1800)
    spent(tmp_path, "e2", evaluation=900)
    lines = printed(capsys, one, two).splitlines()
    place = lines.index("Configuration, A -> B")
    assert lines[place + 1 :] == [
        "  e1 and e2 checkpoint  e1.pth -> e2.pth",
        "",
        "Cost, A and B",
        "  time      1.00 h of GPU X; 0.50 h of GPU X",
    ]
    whole = chain(tmp_path / "chain", 40)
    lines = printed(capsys, one, whole).splitlines()  # of a chain, the stages are not those of an evaluation
    assert "  e1: only in A" in lines and "  r1: only in B" in lines


def test_a_stage_that_has_not_begun_is_in_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (chain(tmp_path / name, 40) for name in ("one", "two"))
    for root in (one, two):
        (Path(root) / "jobs.json").write_text('{"r2": {}}')
        spent(Path(root), "r1", compute=1800)
        spent(Path(root), "eval", evaluation=1800)
    said = printed(capsys, one, two)
    assert "only in" not in said and "2.00 h of GPU X; 2.00 h of GPU X" in said
    (tmp_path / "two" / "r2").mkdir()
    (tmp_path / "two" / "r2" / "config.yaml").write_text("epochs: 3\n")
    assert "A -> B\n  r2: only in B\n\n" in printed(capsys, one, two)


def test_other_data_are_refused_by_what_differs(tmp_path: Path) -> None:
    base = compare.load(save(tmp_path / "base.npz", 40))
    moved, fewer = index_of(), index_of(90)
    moved.boxes[70, 0] += 1
    two = make_index([1] * (IMAGES - 2) + [2, 0], np.array([BOX] * IMAGES), [1] * IMAGES)
    for index, reason in (
        (fewer, "images: 100 of validation and 90 of validation, 90 of them in both"),
        (moved, "boxes: 1 of 100 have moved or have another class; first in "),
        (index_of(label=2), "boxes: 100 of 100 have moved or have another class"),
        (two, "boxes: 100 and 100; first in "),
    ):
        other = compare.load(save(tmp_path / "other.npz", 40, index))
        with pytest.raises(InputError, match=f"not evaluated on the same data; {reason}"):
            compare.check_same(base, other)
        with pytest.raises(InputError, match="not evaluated on the same data"):
            compare.main([base.word, other.word])
    compare.check_same(base, compare.load(save(tmp_path / "other.npz", 90)))


def test_checks_hold_for_every_run_but_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, more, few = (save(tmp_path / f"{found}.npz", found) for found in (40, 60, 42))
    compare.main([base, more, few, "--fail-under", "AP50=0.41", "--fail-if-worse-than", base])
    with pytest.raises(CheckFailed, match=r"42\.npz: AP50 is 0\.426, under 0\.43$"):
        compare.main([base, more, few, "--fail-under", "AP50=0.41", "--fail-under", "AP50=0.43"])
    with pytest.raises(CheckFailed, match=r"40\.npz: AP50 is 0\.406, under 0\.5$"):
        compare.main([base, "--fail-under", "AP50=0.5"])
    with pytest.raises(CheckFailed, match=r"APs is n/a, under 0\.1$"):
        compare.main([base, "--fail-under", "APs=0.1"])
    with pytest.raises(CheckFailed, match=r"42\.npz: AP is worse than that of .*60\.npz: -0\.178, 95 % interval -0"):
        compare.main([few, "--fail-if-worse-than", more])
    compare.main([base, "--fail-if-worse-than", few])  # worse, within noise
    assert capsys.readouterr().out


def test_too_few_images_to_tell_are_no_pass(tmp_path: Path) -> None:
    word = save(tmp_path / "few.npz", 3, index_of(5))
    with pytest.raises(InputError, match=r"boxes in fewer than 8 images: too few"):
        compare.main([word, "--fail-if-worse-than", word])


def test_command_line(tmp_path: Path) -> None:
    word = save(tmp_path / "a.npz", 40)
    answer = run([sys.executable, "-m", "evaluate.compare", word, "--fail-under", "AP=0.5"])
    assert answer.returncode == 5 and answer.stdout.startswith("100 images")
    assert answer.stderr == f"ERROR 5: {word}: AP is 0.406, under 0.5\n"


@pytest.mark.parametrize("word", ["AP51=0.3", "AP", "AP=high", "AP50=nan", "AP=inf", "AP=-inf"])
def test_a_check_that_cannot_be_read_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(["x.npz", "--fail-under", word])
    assert ended.value.code == 2 and word in capsys.readouterr().err


def test_checks_that_hold_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word, before = save(tmp_path / "a.npz", 40), save(tmp_path / "b.npz", 40)
    compare.main([word, "--fail-under", "AP=0.4", "--fail-if-worse-than", before])
    held = f"AP is 0.406, not under 0.4; AP is not worse than that of {before} beyond noise: +0.000"
    assert capsys.readouterr().out.splitlines()[-1] == f"{word}: {held}"


def test_runs_without_detections_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match=r"metrics\.json: give the directory .*, or its detections\.npz$"):
        compare.load(str(tmp_path / "metrics.json"))
    (tmp_path / "chain" / "r1").mkdir(parents=True)
    (tmp_path / "chain" / "r1" / "config.yaml").write_text("epochs: 3\n")
    with pytest.raises(InputError, match="chain: no evaluation in it yet"):
        compare.load(str(tmp_path / "chain"))
    with pytest.raises(InputError, match=r"/none: no such chain, evaluation or detections file$"):
        compare.load(str(tmp_path / "none"))
    old = Path(chain(tmp_path / "old", 40))
    (old / "eval" / "detections.npz").unlink()
    with pytest.raises(InputError, match=r"eval/detections\.npz: No such file.*; evaluate\.run writes it"):
        compare.load(str(old))


def test_published_numbers_are_there_by_name_and_other_runs_by_file(tmp_path: Path) -> None:
    published = references.load("dl-sp22")
    assert tuple(published) == METRICS and published["AP"] == 0.237 and published["ARl"] == 0.5
    chain(tmp_path, 40)
    assert references.load(str(tmp_path / "eval" / "metrics.json")) == dict.fromkeys(METRICS, 0.25)
    with pytest.raises(InputError, match=r"reference dl-sp23: No such file.*; give a metrics\.json, or one of dl-sp22"):
        references.load("dl-sp23")
    with pytest.raises(InputError, match=r"not the metrics\.json of an evaluation"):
        references.load(str(tmp_path / "eval" / "state.json"))
