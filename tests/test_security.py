"""Weights, names, words and strangers on the port run nothing; secrets of the environment get nowhere."""

from __future__ import annotations

import ast
import collections
import contextlib
import io
import os
import pickle
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from jobs import plan, stages, submit
from tests.chains import jobs, launch_small
from tests.checkout import STAGES, Checkout
from tests.cluster import Cluster
from tests.labeled_set import write_set
from tests.ranks import run
from tests.test_detect_train import SMALL
from tests.test_dist import PROGRAM
from tests.test_ssl_train import SMALL as SMALL_PRETRAINING
from tests.test_ssl_train import write_images
from utils import checkpoint, paths
from utils.errors import InputError
from utils.paths import ROOT

PRODUCT = ("jobs", "ssl_train", "detect_train", "evaluate", "utils")
STANDIN = ROOT / "tests" / "standin" / "chain.yaml"

# ---------------------------------------------------------------- no call that runs what it reads

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open",
    "joblib.load", "pandas.read_pickle", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "tempfile.mktemp",
}  # fmt: skip
# A call that is sound only with this argument
REQUIRED = {"torch.load": ("weights_only", "True"), "numpy.load": ("allow_pickle", "False"),
            "yaml.load": ("Loader", "TypedLoader")}  # fmt: skip


def dangerous(source: str) -> Iterator[str]:
    """`line: what` of every call in Python `source` that could run what it is given."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # as used here -> in full
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {(name.asname or name.name): f"{node.module}.{name.name}" for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            first, dot, rest = ast.unparse(node).partition(".")
            full = names.get(first, first) + dot + rest
            if full in FORBIDDEN:
                yield f"{node.lineno}: {full}"
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        full = names.get(first, first) + dot + rest
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if full in REQUIRED and given.get(REQUIRED[full][0]) != REQUIRED[full][1]:
            yield f"{node.lineno}: {full} without {'='.join(REQUIRED[full])}"
        if given.get("shell", "False") != "False":
            yield f"{node.lineno}: shell={given['shell']}"


def test_no_product_code_runs_what_it_reads() -> None:
    files = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in dangerous(path.read_text())]
    assert found == []
    scripts = sorted((ROOT / "slurm").iterdir())
    assert len(scripts) > 5
    assert [path.name for path in scripts if re.search(r"(^|[;&|({])\s*eval\s", path.read_text(), re.M)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path)", "import torch as t; t.load(path, weights_only=False)",
        "from torch import load; load(path)", "import pickle; pickle.loads(data)", "from pickle import load as l; l(f)",
        "import pickle as p; read = p.load", "import numpy as np; np.load(f, allow_pickle=True)",
        "import numpy; numpy.load(f)", "import yaml; yaml.load(t, Loader=yaml.UnsafeLoader)",
        "import yaml; yaml.unsafe_load(t)", "import subprocess; subprocess.run(c, shell=True)",
        "import subprocess; subprocess.Popen(c, shell=flag)", "import os; os.system(c)",
        "from os import system; system(c)",
        "eval(text)", "def f():\n    return exec(text)", "import pandas as pd; pd.read_pickle(f)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert list(dangerous(line))
    assert not list(dangerous("import torch; torch.load(f, weights_only=True); model.eval(); re.compile(x)"))


# ---------------------------------------------------------------- weights


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def weights(form: str, payload: object) -> bytes:
    file = io.BytesIO()
    if form == "pickle":
        return pickle.dumps({"format": checkpoint.FORMAT, "model": payload})
    torch.save({"model": payload}, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("ignore:.*pickle protocol")
def test_a_hostile_weights_file_is_refused_and_does_not_run(form: str, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "weights.pth"
    file.write_bytes(weights(form, Payload(canary)))
    with pytest.raises(InputError, match=r"weights\.pth: not a readable weights file"):
        checkpoint.read(file)
    assert not canary.exists()
    if form == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert canary.exists()  # it would have run


@pytest.mark.parametrize("option", ["--bp", "--resume", "init", "--checkpoint-path"])
def test_the_programs_refuse_it_wherever_it_is_given(option: str, tmp_path: Path) -> None:
    canary, file, data = tmp_path / "canary", tmp_path / "weights.pth", write_set(tmp_path / "data")
    file.write_bytes(weights("legacy" if option == "--bp" else "zip", Payload(canary)))
    program = "evaluate.run" if option == "--checkpoint-path" else "detect_train.train"
    given = [f"init={file}"] if option == "init" else [option, file]
    words = ["device=cpu"] if option == "--checkpoint-path" else SMALL
    command = [sys.executable, "-m", program, "--run-dir", tmp_path / "run", "--dataset-root", data, *given, *words]
    done = run(command)
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"\nERROR 2: {file}: not a readable weights file" in f"\n{done.stderr}"
    assert not canary.exists()


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:.*pickle protocol", "ignore:.*TorchScript")
def test_a_damaged_weights_file_is_read_or_refused_in_a_line(form: str, tmp_path: Path) -> None:
    whole, file = weights(form, {"weight": torch.arange(9.0), "words": [1, "x", 2.5]}), tmp_path / "weights.pth"
    chosen, ends = random.Random(0), collections.Counter[str]()
    for number in range(600):
        damaged = bytearray(whole)
        damaged[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        file.write_bytes(damaged if number % 5 else damaged[: chosen.randrange(len(whole))])
        try:
            checkpoint.read(file)
            ends["read"] += 1
        except InputError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            ends["refused"] += 1
    assert min(ends["read"], ends["refused"]) > 20


# ---------------------------------------------------------------- names and words


def hostile_strings(canary: Path, count: int = 1000) -> list[str]:
    """Strings made of what shells, Slurm, YAML, printf and paths take for something else than itself."""
    touch = f"touch {canary}"
    parts = [
        f"$({touch})", f"`{touch}`", f"; {touch};", f"| {touch}", f"\n{touch}\n", f"&& {touch}", f"'; {touch}; '",
        f'"; {touch}; "', "\n#SBATCH --wrap=x\n", "%j", "%x_%A", "{}", "{0}", "\\", "\r", "\t", "*", "?", "~", "-",
        "--", "-rf", "..", "../..", "/", "//etc", "é", "\u202e", "\u2028", "\U0001f4a5", "'", '"', "$HOME", "${IFS}",
        "!", "#", "=", "a", "r1", "A.b_c-9", " ", "\x1b[2J", "\x7f", ">", f"> {canary}", f"<({touch})",
    ]  # fmt: skip
    chosen = random.Random(7)
    return parts + ["".join(chosen.choices(parts, k=chosen.randint(1, 4))) for _ in range(count - len(parts))]


def test_a_thousand_names_are_harmless_or_refused(tmp_path: Path) -> None:
    taken = 0
    for name in hostile_strings(tmp_path / "canary"):
        try:
            chain = stages.load(STANDIN, name) if name else None
        except InputError as error:
            assert repr(name) in str(error)
            continue
        assert chain and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) and set(name) != {"."}
        assert chain.dir.path.parent == paths.RUNS and chain.dir.path.resolve().parent == paths.RUNS
        taken += 1
    assert 10 < taken < 200
    for name in ("a\n", "", ".", "..", "a" * 65, "a/b", "é"):
        with pytest.raises(InputError):
            paths.check_name(name)


def script(words: list[str]) -> str:
    """The batch script of a stage that gets these words."""
    chain = stages.load(STANDIN, "A.b_c-9")
    asked: plan.Resources = submit.resources(chain, "r1", [])
    return submit.script(submit.executor(chain, "r1", asked, ["17"]), submit.command(chain, "r1", words))


def test_a_thousand_words_reach_the_worker_as_they_were_typed(tmp_path: Path) -> None:
    """The batch script itself, run by bash; only srun is another program, which writes down what it is given."""
    canary, given = tmp_path / "canary", tmp_path / "given"
    words = [f"key={text}" for text in hostile_strings(canary)]
    (tmp_path / "srun").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" >{given}\n")
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "job.sh").write_text(script(words))
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=False).returncode == 0
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RELAY_PYTHON": "true", "SLURM_JOB_ID": "17"}
    done = subprocess.run(
        ["bash", tmp_path / "job.sh"], cwd=tmp_path, env={**os.environ, **environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    received = given.read_bytes().decode().split("\0")
    assert received[received.index("r1") :] == ["r1", f"--file={STANDIN}", "--name=A.b_c-9", *words, ""]
    assert not canary.exists()


def test_the_launcher_takes_words_as_words(tmp_path: Path) -> None:
    here, canary = Checkout(tmp_path), tmp_path / "canary"
    for name in (f"$(touch {canary})", f"a;touch {canary}", "a\nb", "../../a", "%j", "-rf x"):
        refused = here.launch("--chain", "--cluster", "local", "--dry-run", f"--name={name}")
        assert refused.returncode == 2 and f"chain name {name!r}" in refused.stdout, refused.stdout
    folders = ["$(touch CANARY)", "x';touch CANARY;'", "a`touch CANARY`", "b;touch CANARY;"]
    for folder in folders:
        (here.root / folder / "training" / "images").mkdir(parents=True)
    words = [f"{stage}.data.labeled={folder}" for stage, folder in zip(STAGES, folders, strict=False)]
    shown = here.local("--chain", "--dry-run", *words)
    assert shown.returncode == 0, shown.stdout
    commands = [line for line in shown.stdout.split("\n# ") if "jobs.worker" in line]
    assert len(commands) == 5
    for command in commands:
        done = here.run("bash", "-c", command.partition("\n")[2])
        assert done.returncode == 0, done.stdout
    assert [here.state(stage)["config"]["data.labeled"] for stage in STAGES[:4]] == folders
    assert not canary.exists() and not list(here.root.rglob("CANARY"))


# ---------------------------------------------------------------- secrets

SECRETS = {
    "RELAY_CANARY_TOKEN": "canary-4f1f0c53", "AWS_SECRET_ACCESS_KEY": "canary-9b2e77aa",
    "WANDB_API_KEY": "canary-c0ffee42", "HF_TOKEN": "canary-00ddba11", "MY_PASSWORD": "canary-5eede5ee",
}  # fmt: skip


def leaks(folder: Path, *outputs: str) -> list[str]:
    """The files in `folder`, and outputs by number, in which the value of a secret stands."""
    texts = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    texts |= {f"output {number}": text.encode() for number, text in enumerate(outputs)}
    return [name for name, text in texts.items() if any(value.encode() in text for value in SECRETS.values())]


def test_no_secret_of_the_environment_gets_into_a_file_or_an_output(tmp_path: Path) -> None:
    here = Checkout(tmp_path)
    here.environ |= SECRETS
    outputs = [
        here.local("--chain").stdout,
        here.local("--chain", "--name", "broken", "r1.fail=error").stdout,
        here.launch("--status").stdout,
        here.launch("--status", "--name", "broken").stdout,
        here.launch("--chain", "--cluster", "local", "--name", "other", "--dry-run").stdout,
    ]
    data, folder = write_images(tmp_path / "images"), here.root / "runs" / "real"
    command = [sys.executable, "-m", "ssl_train.train", "--run-dir", folder, "--dataset-root", data, "--epochs", "1"]
    for words in ([], ["optim.lr=1e30", "resume=never"]):
        done = run([*command, *SMALL_PRETRAINING, *words], SECRETS)
        outputs += [done.stdout, done.stderr]
    files = [path for path in (here.root / "runs").rglob("*") if path.is_file()]
    assert {"state.json", "config.yaml", "metrics.jsonl", "backbone.pth"} <= {path.name for path in files}
    assert "RuntimeError: the disk" in "".join(outputs) and "ERROR 4" in "".join(outputs)
    assert leaks(here.root / "runs", *outputs) == []
    (here.root / "runs" / "planted.log").write_text(f"key {SECRETS['HF_TOKEN']}")
    assert leaks(here.root / "runs", "fine", f"x{SECRETS['MY_PASSWORD']}") == [
        str(here.root / "runs" / "planted.log"), "output 1"
    ]  # fmt: skip


@pytest.mark.slurm
@pytest.mark.usefixtures("nothing_stays_queued")
def test_no_secret_gets_into_what_slurm_s_jobs_leave(tmp_path: Path, cluster: Cluster) -> None:
    here = Checkout(tmp_path, cluster)
    here.environ |= SECRETS
    outputs = [launch_small(here, "--chain"), here.launch("--status").stdout]
    for job in jobs(here).values():
        assert cluster.wait(job) == "COMPLETED"
        outputs.append(cluster.run("scontrol", "show", "job", job).stdout)
        outputs.append(cluster.run("sacct", "-n", "-P", "-j", job, "-o", "ALL").stdout)
    assert list((here.root / "runs").rglob("*.sh")) and all(outputs)
    assert leaks(here.root / "runs", *outputs) == []


# ---------------------------------------------------------------- strangers on the port


def torchrun_like(rank: int, port: int) -> dict[str, str]:
    """The variables torchrun gives one of two ranks that rank 0 listens for."""
    return {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


@contextlib.contextmanager
def starting() -> Iterator[Callable[[Path, dict[str, str]], subprocess.Popen[str]]]:
    """A function that starts a rank; those that still run at the end are killed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC"))}
    with contextlib.ExitStack() as stack:

        def start(folder: Path, environ: dict[str, str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, folder],
                cwd=ROOT,
                env={**inherited, "OMP_NUM_THREADS": "1", **environ},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.kill)
            return process

        yield start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_it_listens(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return


def test_two_runs_on_one_port_do_not_meet(tmp_path: Path) -> None:
    port = free_port()
    with starting() as start:
        ours = [start(tmp_path / "a" / "run", torchrun_like(0, port))]
        wait_until_it_listens(port)
        theirs = [start(tmp_path / "b" / "run", torchrun_like(rank, port)) for rank in (1, 0)]
        for process in theirs:
            answer = process.communicate(timeout=60)[0]
            assert process.returncode != 0 and "EnvironmentProblem" in answer and str(port) in answer, answer
            assert "0.5" not in answer
        ours.append(start(tmp_path / "a" / "run", torchrun_like(1, port)))
        for rank, process in enumerate(ours):
            answer = process.communicate(timeout=60)[0]
            assert process.returncode == 0 and f"rank {rank} of 2: [0.0, 10.0, 11.0] 0.5" in answer, answer


def test_a_stranger_on_torchrun_s_port_ends_the_run(tmp_path: Path) -> None:
    stranger = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    stranger.set("token", "of another run")
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    done = run([*launcher, f"--master-port={stranger.port}", tmp_path / "program.py", tmp_path / "run"], timeout=30)
    assert done.returncode != 0
    assert "0.5" not in done.stdout
