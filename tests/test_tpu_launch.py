"""--cluster tpu before there is a VM: quoting, dry runs, what is refused, and the copy of the checkout."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import preflight, stages, tpu, tpu_code
from jobs.arguments import parse
from jobs.plan import Step
from jobs.stages import word
from jobs.tpu_shown import shown
from jobs.tpu_vm import Vm, identity
from tests.test_tpu import CHAIN, TpuCheckout, here, verbs
from utils.errors import EnvironmentProblem, InputError
from utils.paths import ROOT

__all__ = ["here"]  # a fixture
NASTY = """it's "$HOME" `id` $(id) \\ ; & | > * ? ~ # ! {a,b} --resume=x ü 日本 \t end"""


def test_names_and_words_arrive_on_the_vm_as_they_are(here: TpuCheckout) -> None:
    file = "jobs/my 'own' $chain.yaml"
    (here.root / file).write_text(CHAIN)
    words = [word("data.note", NASTY), "data.note=-a  b\nc", "pretrain.optim.lr=0.5"]
    store = "gs://bucket/rel  ay's"
    given = ["--only", "pretrain", "--file", file, "--name=-odd.Name_", "--store", store, *words]
    done = here.run(sys.executable, "jobs/launch.py", "--cluster", "tpu", *given)
    assert done.returncode == 0, done.stdout
    places = [f"--file={file}", "--name=-odd.Name_", f"--store={store}"]
    expected = ["-m", "jobs.worker", "pretrain", *places, *words[:2], "optim.lr=0.5", "device=xla"]
    assert here.google.remote() == [expected]
    assert here.state("pretrain", "-odd.Name_")["config"]["data.note"] == "-a  b c"  # what YAML makes of it


def test_the_commands_of_the_readme(here: TpuCheckout) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (on_a_vm,) = [block for block in blocks if "--cluster tpu" in block]
    (in_a_vm,) = [block for block in blocks if "--device xla" in block]
    for python, block in (("python ", on_a_vm), (".venv-tpu/bin/python ", in_a_vm)):
        for line in block.splitlines():
            done = here.run(sys.executable, *shlex.split(line.removeprefix(python)), HOME=str(here.google.disk))
            assert done.returncode == 0, f"{line}\n{done.stdout}"
    assert [words[2] for words in here.google.remote()] == ["pretrain", "r1", "r2", "r3", "eval", "pretrain"]


def test_a_dry_run_prints_every_command_as_the_shell_takes_it(here: TpuCheckout) -> None:
    here.edit("jobs/mine.yaml", "zone:", "queued: true, spot: true, project: my-project, zone:")
    before = here.files()
    dry = here.launched("--only", "r1", "r1.backbone=null", "data.note=-a  b", "--dry-run")
    assert dry.returncode == 0, dry.stdout
    commands = [shlex.split(line) for line in dry.stdout.splitlines() if line.startswith("gcloud ")]
    assert [" ".join(command[3:5]) for command in commands] == [
        *(asked := ["tpu-vm describe", "queued-resources describe"]),
        "queued-resources create",
        *asked,
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "queued-resources delete",
    ]
    assert all({"--zone=us-central2-b", "--project=my-project", "--quiet"} <= set(command) for command in commands)
    stage = next(word for word in commands[7] if word.startswith("--command="))
    assert shlex.split(stage.removeprefix("--command="))[-2:] == ["data.note=-a  b", "device=xla"]
    assert (here.files(), here.google.calls()) == (before, [])


def test_all_that_a_vm_has_to_be_told_is_asked_for_at_once(here: TpuCheckout) -> None:
    words = [sys.executable, "jobs/launch.py", "--chain", "--cluster", "tpu", "--dry-run"]
    shipped = subprocess.run([*words, "--file", "jobs/tpu.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert (shipped.returncode, shipped.stderr.splitlines()) == (
        2,
        [
            f"ERROR 2: {ROOT}/jobs/tpu.yaml:",
            "  store: required for --cluster tpu, such as gs://my-bucket/relay; or give --store URL",
            "  tpu.zone: required for --cluster tpu, such as us-central2-b",
        ],
    )
    none = here.run(*words, "--file", "tests/standin/chain.yaml", "--store", "s3://bucket")
    assert "store=s3://bucket: for --cluster tpu a bucket, gs://my-bucket or gs://my-bucket/folder" in none.stdout
    assert "tpu: this section is required for --cluster tpu; jobs/tpu.yaml is an example" in none.stdout
    assert here.google.calls() == []


def test_what_is_only_on_this_machine_is_refused(
    here: TpuCheckout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.pth").touch()
    refused = here.launched("--chain", "data.labeled=data/x.sqsh", f"r1.backbone={tmp_path}/w.pth")
    assert refused.returncode == 2
    labeled = "data.labeled=data/x.sqsh: is on this machine; copy it to a bucket and give its gs:// URL"
    assert f"  pretrain: {labeled}" in refused.stdout
    assert f"  r1: backbone={tmp_path}/w.pth: is on this machine, and no file of the checkout" in refused.stdout
    (tmp_path / "outside.yaml").write_text(CHAIN.replace("../", f"{here.root}/"))
    outside = here.run(*here.tpu("--chain"), "--file", tmp_path / "outside.yaml")
    assert (outside.returncode, f"move there {tmp_path}/outside.yaml\n" in outside.stdout) == (2, True)
    assert (verbs(here.google), here.google.calls()) == ([], [])
    chain = stages.load(here.root / "jobs/mine.yaml")
    config = {"data.labeled": "gs://bucket/x.sqsh", "backbone": "gs://bucket/w.pth", "data.classes": "README.md"}
    monkeypatch.setattr(preflight, "problems", lambda *_: iter(["what fails anywhere"]))
    code = tpu_code.Code("relay-1", b"", frozenset(["README.md"]))
    assert list(tpu.problems(chain, Step("r1", "run", [], config, []), code)) == ["what fails anywhere"]


def test_the_chips_are_xla_and_device_is_a_word_of_every_stage(here: TpuCheckout) -> None:
    assert parse("", ["--chain", "--cluster", "tpu"]).words == ["device=xla"]
    assert parse("", ["--stage", "r1", "--device", "xla", "workers=2"]).words == ["workers=2", "device=xla"]
    with pytest.raises(InputError, match="--device cuda: the chips of --cluster tpu are xla"):
        parse("", ["--chain", "--cluster", "tpu", "--device", "cuda"])
    ranks = here.launched("--chain", "--ranks", "2")
    assert (ranks.returncode, "a TPU VM runs one on each of its chips" in ranks.stdout) == (2, True)
    local = here.run(sys.executable, "jobs/launch.py", "--file", "tests/standin/chain.yaml", "--cluster", "local",
                     "--only", "pretrain", "--device", "cpu")  # fmt: skip
    assert (local.returncode, here.state("pretrain")["config"]["device"]) == (0, "cpu")


def pack(here: TpuCheckout) -> Any:
    """What the checkout's own jobs/tpu_code.py packs: folder and names."""
    code = "from jobs.tpu_code import pack; made = pack(); print(made.folder, *sorted(made.names), sep='\\n')"
    folder, *names = here.run(sys.executable, "-c", code).stdout.splitlines()
    return folder, names


def test_the_copy_is_named_by_what_is_in_it(here: TpuCheckout) -> None:
    folder, names = pack(here)
    assert {"jobs/mine.yaml", "jobs/tpu.py", "Makefile"} <= set(names)
    assert not [name for name in names if name.startswith((".git/", "runs/")) or "__pycache__" in name]
    (here.root / "runs/ignored").touch()
    (here.root / "Makefile").touch()
    assert pack(here) == (folder, names)
    (here.root / "new file.txt").touch()
    assert pack(here)[0] != folder
    assert pack(here)[1] == sorted([*names, "new file.txt"])
    (here.root / "new file.txt").unlink()
    assert pack(here)[0] == folder
    (here.root / "Makefile").chmod(0o755)
    assert pack(here)[0] != folder
    (here.root / ".git").rename(here.root / "runs/git")
    refused = here.launched("--chain", "--dry-run")
    assert (refused.returncode, "copies the files that git lists" in refused.stdout) == (75, True)


def test_a_vm_belongs_to_one_chain_of_one_store(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(CHAIN.replace("../", f"{ROOT}/"))

    def name_of(name: str, store: str) -> str:
        return identity(stages.load(tmp_path / "chain.yaml", name, store))

    names = [name_of(*of) for of in (("a_b", "gs://x"), ("a.b", "gs://x"), ("a_b", "gs://y"), ("-" * 64, "gs://y"))]
    assert len(set(names)) == 4
    assert all(name.replace("-", "").isalnum() and name == name.lower() and len(name) < 63 for name in names)
    assert name_of("a_b", "gs://x/") == names[0]


def test_the_first_host_that_fails_says_how_a_slice_ended(tmp_path: Path, capfdbinary: Any) -> None:
    lines = ["ü", "relay-tpu: the stage ended with 0", "x relay-tpu: the stage ended with 4", "ERROR 4: why"]
    lines += ["relay-tpu: the stage ended with 75"]
    ended = shown(["printf", "%s\\n", *lines], tmp_path / "log")
    assert (ended.gcloud, ended.codes, ended.code, ended.cause) == (0, [0, 4, 75], 4, "why")
    assert capfdbinary.readouterr().out == (tmp_path / "log").read_bytes() == "\n".join([*lines, ""]).encode()


@pytest.mark.parametrize("spot", [False, True])
def test_the_flags_of_a_vm(spot: bool) -> None:
    chain = stages.load(ROOT / "jobs/tpu.yaml", None, "gs://bucket")
    assert chain.tpu
    vm = Vm("name", type(chain.tpu)(zone="z", accelerator="v4-8", version="v", spot=spot))
    flags = ["--accelerator-type=v4-8", "--version=v", *(["--spot"] if spot else [])]
    assert vm.create() == ["gcloud", "compute", "tpus", "tpu-vm", "create", "name", *flags, "--zone=z", "--quiet"]
    alive = ["--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oServerAliveCountMax=10"]
    assert vm.ssh("ls")[6:] == ["--worker=all", *alive, "--command=ls", "--zone=z", "--quiet"]


def test_the_code_needs_git_to_say_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_code, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(EnvironmentProblem, match=r"copies the files that git lists .*not a git repository"):
        tpu_code.pack()
    assert subprocess.run(["git", "init", "-q", tmp_path], check=True).returncode == 0
    assert tpu_code.pack().names == frozenset()
