"""Chain files, the order and command lines of stages, words for many stages, and what counts as done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import preflight, stages, state
from jobs.overrides import distribute
from jobs.plan import Step
from jobs.stages import Chain, word
from tests.checkout import STAGES
from utils import checkpoint_files, config, files, paths, typed_yaml
from utils.errors import CheckpointError, InputError
from utils.paths import ROOT

STANDIN = ROOT / "tests/standin/chain.yaml"


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    return stages.load(STANDIN)


def write(tmp_path: Path, content: dict[str, Any]) -> Path:
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def a_stage(**inputs: str) -> dict[str, Any]:
    fields = {
        "module": "tests.standin.train",
        "config": "tests/standin/r1.yaml",
        "slurm": "slurm/demo_mocov2_fpn_r1.slurm",
    }
    return {**fields, "inputs": inputs} if inputs else fields


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_stage_of_a_shipped_chain_resolves_with_its_inputs(file: Path) -> None:
    chain = stages.load(file)
    order = list(chain.stages)
    assert order == STAGES or "two_stage" in file.stem
    for stage in chain.stages.values():
        assert set(stage.parents) <= set(order[: order.index(stage.name)])
        data = next(key for key in ("data.unlabeled", "data.labeled") if key in dict.fromkeys(stage.keys()))
        resolved = chain.resolve(stage.name, [f"{data}=there"])
        assert {key: resolved[key] for key in stage.inputs} == stage.inputs


def test_the_order_follows_from_the_inputs(tmp_path: Path) -> None:
    content = {"last": a_stage(init="middle.last"), "middle": a_stage(init="first.last"), "first": a_stage()}
    assert list(stages.load(write(tmp_path, {"stages": content})).stages) == ["first", "middle", "last"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": a_stage(init="b.last")}, "stages.a.inputs.init: 'b.last' is not <stage>.<output>"),
        ({"a": a_stage(init="b.last"), "b": a_stage(init="a.last")}, "wait for each other: a -> b -> a"),
        ({"a": a_stage() | {"config": "none.yaml"}}, "stages.a.config: none.yaml: no such file"),
        ({"a": {"config": "tests/standin/r1.yaml"}}, "stages.a.module: required\n  stages.a.slurm: required"),
        ({"a b": a_stage()}, "stage name 'a b'"),
        ({"a": a_stage() | {"modul": "x"}}, "unknown key 'stages.a.modul'"),
        ({}, "no stages"),
    ],
)
def test_a_bad_chain_file_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        stages.load(write(tmp_path, {"stages": content}))
    assert message in str(error.value)


def test_the_words_of_a_chain_file_reach_the_stages_that_know_them_and_the_command_line_wins(
    tmp_path: Path,
) -> None:
    content = {
        "overrides": {"data": {"labeled": "012"}, "b": {"epochs": 9}},
        "stages": {"a": a_stage(), "b": a_stage()},
    }
    chain = stages.load(write(tmp_path, content), "mine")
    assert (chain.resolve("a", [])["data.labeled"], chain.resolve("a", [])["epochs"]) == ("012", 3)
    assert chain.resolve("b", [])["epochs"] == 9
    assert chain.resolve("b", ["epochs=8"])["epochs"] == 8
    with pytest.raises(InputError, match=r"unknown key 'data\.lab'; did you mean 'data\.labeled'"):
        stages.load(write(tmp_path, {**content, "overrides": {"data": {"lab": 1}}}))


@pytest.mark.parametrize("value", ["a b", "012", "x # y", "1e-3", "null", "", None, 1e-5, 3, [1, 2], True, "ü=1: 2"])
def test_a_word_reads_back_as_its_value(value: Any) -> None:
    key, text = config.split_override(word("key", value))
    assert (key, typed_yaml.parse(str(text), key)) == ("key", value)


def test_a_stage_resolves_to_its_configuration_with_parents_by_name(chain: Chain) -> None:
    resolved = chain.resolve("r2", ["--lr", "0.5"])
    assert resolved["init"] == "r1.last"
    assert resolved["optim.lr"] == 0.5
    assert resolved["run_dir"] == str(paths.RUNS / "standin" / "r2")
    assert chain.needs("r2", resolved) == ["r1"]
    with pytest.raises(InputError, match="run_dir=/elsewhere: in a chain it follows from --name"):
        chain.resolve("r2", ["--run-dir", "/elsewhere"])


@pytest.mark.parametrize("words", [["--bp", "other.pth"], ["backbone=null"], ["--resume", "checkpoint_0003.pth"]])
def test_what_is_given_by_hand_needs_no_parent(chain: Chain, words: list[str]) -> None:
    assert chain.needs("r1", chain.resolve("r1", [])) == ["pretrain"]
    assert chain.needs("r1", chain.resolve("r1", words)) == []


def test_words_go_to_the_stages_that_know_them(chain: Chain) -> None:
    words = distribute(["data.fold=2", "r1.optim.lr=1", "workers=3"], chain.stages, ["r1", "r2"], "here")
    assert words == {"r1": ["data.fold=2", "optim.lr=1", "workers=3"], "r2": ["data.fold=2", "workers=3"]}


def test_every_word_that_fits_nowhere_or_differently_is_listed(chain: Chain) -> None:
    with pytest.raises(InputError) as error:
        distribute(["epochs=3", "optim.rl=1", "pretrain.epochs=1"], chain.stages, ["r1", "r2"], "here")
    assert str(error.value).splitlines() == [
        "here:",
        "  epochs differs between stages (r1 3, r2 4): say r2.epochs=VALUE",
        "  unknown key 'optim.rl'; did you mean 'optim.lr'? (known: optim.lr)",
        "  pretrain.epochs=1: pretrain is not among the selected stages (r1, r2)",
    ]


def foreseen(stage: str, *words: str, ranks: int = 1) -> list[str]:
    """What the reference chain's preflight says about a stage."""
    chain = stages.load(paths.CHAIN_FILE)
    return list(preflight.problems(chain, Step(stage, "run", words, chain.resolve(stage, words), []), ranks))


def test_only_what_trains_splits_its_batch_over_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "training/images").mkdir(parents=True)
    words = [f"data.labeled={tmp_path}", "batch_size=4"]
    assert foreseen("r1", *words, ranks=3) == ["batch_size=4 cannot be split over 3 ranks"]
    assert foreseen("eval", *words, "data.split=training", ranks=3) == []


@pytest.mark.parametrize("key", ["data.classes", "backbone", "init", "best", "resume"])
def test_every_file_that_is_named_must_be_there(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "labeled/training/images").mkdir(parents=True)
    words = ["data.labeled=~/", "init=r1.last", f"{key}=~/a.pth"]
    assert foreseen("r2", *words) == [f"{key}={tmp_path}/a.pth: no such file"]
    (tmp_path / "a.pth").touch()
    assert foreseen("r2", *words) == []


def test_a_folder_of_data_has_the_split_or_images(tmp_path: Path) -> None:
    (tmp_path / "labeled/training/images").mkdir(parents=True)
    assert foreseen("r1", f"data.labeled={tmp_path}") == []
    assert foreseen("eval", f"data.labeled={tmp_path}", "data.split=validation") == [
        f"data.labeled: {tmp_path}: no folder validation/images or labeled/validation/images in it"
    ]
    empty = f"data.unlabeled: {tmp_path}: no image in it (.png, .jpg, .jpeg)"
    assert foreseen("pretrain", f"data.unlabeled={tmp_path}") == [empty]
    (tmp_path / "labeled/1.JPEG").touch()
    assert foreseen("pretrain", f"data.unlabeled={tmp_path}") == []


def finish(chain: Chain, stage: str, text: str = "") -> None:
    """Leave the marker and the outputs of a stage that is done."""
    resolved, run_dir = chain.resolve(stage, []), chain.run_dir(stage)
    inputs = {}
    for key, source in chain.stages[stage].inputs.items():
        parent, _, output = source.partition(".")
        inputs[key] = {"from": source, **state.read(chain, parent)["outputs"][output]}
    state.running(chain, stage, resolved, run_dir.logs / "log")
    state.update(chain, stage, inputs=inputs)
    outputs = {name: run_dir.path / name for name in ("last", "best", "backbone")}
    for path in outputs.values():
        files.write_text(path, stage + text)
    state.done(chain, stage, {"outputs": outputs, "epochs": 1, "metrics": {}})


def test_a_stage_is_stale_once_a_stage_before_it_is_made_anew(chain: Chain) -> None:
    for stage in STAGES:
        finish(chain, stage)
    assert [state.read(chain, stage)["status"] for stage in STAGES] == ["done"] * 5
    finish(chain, "r1", " again")
    assert [state.read(chain, stage)["status"] for stage in STAGES] == [
        "done",
        "done",
        "stale",
        "stale",
        "stale",
    ]
    finish(chain, "r1")  # byte for byte what r2 was made from
    assert [state.read(chain, stage)["status"] for stage in STAGES] == ["done"] * 5
    paths.set_aside(chain.run_dir("r2").path)
    assert [state.read(chain, stage)["status"] for stage in STAGES[2:]] == ["todo", "stale", "stale"]


def test_done_means_done_with_this_configuration(chain: Chain) -> None:
    assert not state.is_done(chain, "pretrain", chain.resolve("pretrain", []))
    finish(chain, "pretrain")
    finish(chain, "r1")
    assert state.is_done(chain, "r1", chain.resolve("r1", ["workers=9", "resume=never"]))
    with pytest.raises(InputError, match=r"optim.lr 0.03 -> 0.1; use --from r1 .* or --name"):
        state.is_done(chain, "r1", chain.resolve("r1", ["--lr", "0.1"]))
    with pytest.raises(InputError, match=r"backbone pretrain.backbone -> other.pth"):
        state.is_done(chain, "r1", chain.resolve("r1", ["--bp", "other.pth"]))
    path = chain.run_dir("pretrain").path / "backbone"
    assert state.is_done(chain, "r1", chain.resolve("r1", ["--bp", str(path)]))


def test_what_a_done_stage_leaves_is_whole_and_kept_from_changes(chain: Chain) -> None:
    finish(chain, "pretrain")
    assert chain.run_dir("pretrain").path.joinpath("last").stat().st_mode & 0o222 == 0
    state.running(chain, "pretrain", {}, chain.run_dir("pretrain").logs / "log")
    saved = chain.run_dir("pretrain").path / "last"
    checkpoint_files.record(saved, files.sha256(saved))
    saved.unlink()
    files.write_text(saved, "pretrainX")
    with pytest.raises(CheckpointError, match="last: damaged"):
        state.done(chain, "pretrain", {"outputs": {"last": saved}, "epochs": 1, "metrics": {}})
    assert state.read(chain, "pretrain")["status"] == "running"


def test_the_marker_survives_a_failure_of_another_attempt(chain: Chain, tmp_path: Path) -> None:
    state.running(chain, "pretrain", {}, tmp_path / "log")
    state.update(chain, "pretrain", job_id="of another job")
    state.ended(chain, "pretrain", RuntimeError("ours"), tmp_path / "log")
    marker = json.loads(chain.run_dir("pretrain").state.read_text())
    assert (marker["status"], marker["cause"]) == ("running", None)


def test_a_chain_file_says_where_runs_are_mirrored_and_on_which_vm_they_run(tmp_path: Path) -> None:
    content = {"stages": {"a": a_stage()}, "store": "gs://bucket/relay/", "tpu": {"zone": "here", "spot": True}}
    chain = stages.load(write(tmp_path, content))
    assert chain.tpu and (chain.tpu.zone, chain.tpu.spot, chain.tpu.name) == ("here", True, None)
    assert (chain.url(), chain.url("a")) == ("gs://bucket/relay/chain", "gs://bucket/relay/chain/a")
    assert chain.worker_words("a", ["b=1"])[-2:] == ["--store=gs://bucket/relay/", "b=1"]
    assert stages.load(write(tmp_path, content), store="gs://other").url() == "gs://other/chain"
    plain = stages.load(write(tmp_path, {"stages": {"a": a_stage()}}))
    assert (plain.store, plain.tpu, len(plain.worker_words("a", []))) == (None, None, 3)


def test_all_that_is_wrong_with_a_chain_file_is_told_at_once(tmp_path: Path) -> None:
    content = {"stages": {"a": a_stage() | {"modul": "x"}}, "stor": "gs://b", "tpu": {"zon": "z", "spot": "yes"}}
    with pytest.raises(InputError) as error:
        stages.load(write(tmp_path, content))
    for problem in (
        "unknown key 'stages.a.modul'; did you mean 'stages.a.module'",
        "unknown key 'stor'; did you mean 'store'",
        "unknown key 'tpu.zon'; did you mean 'tpu.zone'",
        "tpu.spot: expected bool, got 'yes' (str)",
    ):
        assert problem in str(error.value)
