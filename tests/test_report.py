"""Reports: what is written is read back number for number; what is not whole is no result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluate import index, report
from tests.ranks import run
from utils.coco import METRICS
from utils.errors import InputError

TABLE = "\n".join(f" Average Precision  (AP) @[ line {n} ] = 0.123" for n in range(12))


def make_result(**changes: Any) -> dict[str, Any]:
    numbers = [1 / 3, 2 / 7, 0.1 + 0.2, -1.0, 1e-17, 0.0, 1.0, 0.42, 0.428, 0.031, 0.2, 0.5]
    return {
        "job": "4711",
        "date": "2030-01-02 03:04:05",
        "checkpoint": "runs/a b/best.pth",
        "epoch": 36,
        "images": 20000,
        "classes": ["zebra", "cup or mug", "a,b\nc\u2028"],
        "versions": {"torch": "2.11.0"},
        "stats": dict(zip(METRICS, numbers, strict=True)),
        "per_class": {"zebra": 1 / 7, "cup or mug": -1.0, "a,b\nc\u2028": 0.5},
    } | changes


def test_a_report_reads_back_to_the_same_numbers() -> None:
    result = make_result()
    text = report.render(result, TABLE)
    assert report.parse(text, "x") == result
    assert f"\n{TABLE}\n" in text
    assert "# checkpoint: runs/a b/best.pth\n" in text
    assert "# versions: torch 2.11.0\n" in text
    lines = text.splitlines()
    assert lines[-1] == report.END
    assert lines.index(" cup or mug  n/a") < lines.index(" zebra       0.143")


def test_every_cut_of_a_report_is_no_result() -> None:
    text = report.render(make_result(), TABLE)
    whole = len(text.rstrip("\n"))
    for length in range(whole):
        assert report.parse(text[:length], "x") is None
    assert report.parse(text[:whole], "x") == make_result()


def test_table_of_reports(tmp_path: Path) -> None:
    (tmp_path / "eval_1.out").write_text(report.render(make_result(), TABLE))
    (tmp_path / "eval_2.out").write_text(report.render(make_result(job="2"), TABLE)[:-30])
    (tmp_path / "eval_33.out").write_text(report.render(make_result(job="33", epoch=7, images=12), TABLE))
    lines = list(index.summary(sorted(tmp_path.glob("*.out"))))
    assert lines[0].split() == ["file", "job", "epoch", "images", *METRICS]
    first, torn, last = (line.removeprefix(str(tmp_path)).split() for line in lines[1:])
    assert first[1:4] == ["4711", "36", "20000"]
    assert " ".join(first[4:]) == "0.333 0.286 0.300 n/a 0.000 0.000 1.000 0.420 0.428 0.031 0.200 0.500"
    assert torn == ["/eval_2.out", "no", "result"]
    assert last[1:4] == ["33", "7", "12"]
    column = lines[0].index(" AP50")
    assert [line[column : column + 6].strip() for line in (lines[1], lines[3])] == ["0.286", "0.286"]


def test_command_line(tmp_path: Path) -> None:
    good = tmp_path / "eval_1.out"
    good.write_text(report.render(make_result(), TABLE))
    program = (sys.executable, "-m", "evaluate.report")
    assert run([*program, good]).stdout == "\n".join(index.summary([good])) + "\n"
    other = tmp_path / "eval_2.out"
    other.write_bytes(b"Loading \xff modules\n")
    for bad, reason in ((other, "not an evaluation report"), (tmp_path / "none.out", "No such file")):
        answer = run([*program, good, bad])
        assert (answer.returncode, answer.stdout) == (2, "")
        assert answer.stderr.startswith(f"ERROR 2: {bad}: {reason}")
    assert run(program).returncode == 2


def test_a_folder_stands_for_the_reports_below_it(tmp_path: Path) -> None:
    for number, name in enumerate(("b/eval", "a/eval", "a/deep/er", ".hidden/eval")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"eval_{number}.out").write_text(report.render(make_result(job=str(number)), TABLE))
    (tmp_path / "eval_fpn_4711.out").write_text("Loading modules\n")  # a log of Slurm's
    (tmp_path / "eval_9.out").write_text("")
    (tmp_path / "a" / "notes.out").write_text(report.render(make_result(), TABLE))
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    rows = [line.split() for line in index.summary([tmp_path])][1:]
    below = [(row[0].removeprefix(str(tmp_path)), row[1]) for row in rows]
    expected = [("/a/deep/er/eval_2.out", "2"), ("/a/eval/eval_1.out", "1"), ("/b/eval/eval_0.out", "0")]
    assert below == [*expected, ("/eval_9.out", "no")]
    one = tmp_path / "a" / "notes.out"
    assert [line.split()[0] for line in index.summary([one, tmp_path / "b"])][1:] == [str(one), f"{rows[2][0]}"]


def test_what_a_report_quotes_is_not_taken_for_its_numbers(tmp_path: Path) -> None:
    trap = '{"stats": {"AP": 1.0}, "epoch": 99, "images": 99}'
    result = make_result(job=f'x"job": "{trap}', checkpoint=trap, epoch=7, classes=[trap])
    file = tmp_path / "eval_1.out"
    file.write_text(report.render(result, TABLE))
    _, row = index.summary([file])
    assert row.endswith(
        "7      20000   0.333  0.286  0.300  n/a    0.000  0.000  1.000  0.420  0.428  0.031  0.200  0.500"
    )


def test_a_report_larger_than_a_piece_is_read_whole(tmp_path: Path) -> None:
    result = make_result(classes=[f"class {number}" for number in range(9000)])
    file = tmp_path / "eval_1.out"
    file.write_text(report.render(result, TABLE))
    assert file.stat().st_size > 2 * index.PIECE
    assert list(index.summary([file]))[1].split()[1:4] == ["4711", "36", "20000"]


def test_reading_reports_needs_no_torch() -> None:
    ours = "evaluate.report, evaluate.config, evaluate.compare"
    code = f"import {ours}, sys; print([m for m in sys.modules if 'torch' in m])"
    answer = run([sys.executable, "-c", code])
    assert answer.stdout == "[]\n", answer.stderr


def changed(**values: Any) -> str:
    result = make_result()
    return json.dumps(result | values | {"stats": result["stats"] | values.get("stats", {})})


@pytest.mark.parametrize(
    "line",
    [
        None,
        "",
        changed()[:-1].replace("stats", "x"),
        '{"job": ' + "[" * 100_000,
        json.dumps({"job": "1", "epoch": 1, "images": 1}),
        json.dumps(make_result(stats={"AP": 0.5})),
        json.dumps(make_result(stats=[0.5] * 12)),
        changed(stats={"AP": "0.5"}),
        changed(stats={"ARl": float("nan")}),
        changed(epoch="36"),
        changed(images=None),
        changed(job=["4711"]),
        changed(job="a\0b\nc\udcff"),
    ],
    ids=range(13),
)
def test_one_damaged_report_does_not_end_the_table_of_all(tmp_path: Path, line: str | None) -> None:
    bad = tmp_path / "eval_1.out"
    bad.write_text("\n".join([report.TITLE, *([] if line is None else [report.RESULT + line]), report.END, ""]))
    (tmp_path / "eval_2.out").write_text(report.render(make_result(), TABLE))
    first, second = list(index.summary([tmp_path]))[1:]
    assert first.split() == [str(bad), "no", "result"] and second.split()[1:4] == ["4711", "36", "20000"]
    with pytest.raises(InputError, match=rf"^{bad}: damaged"):
        index.summary([bad])
    with pytest.raises(InputError, match=r"^mine: damaged"):
        report.parse(bad.read_text(), "mine")


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.out: No such file"):
        index.summary([tmp_path / "nothing.out"])
    (tmp_path / "eval").mkdir()
    with pytest.raises(InputError, match=r"/eval: no eval_<jobid>\.out below it$"):
        index.summary([tmp_path / "eval"])
