"""The launcher on this machine: order, what is skipped or done again, and what is refused beforehand."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import enqueue, stages, submit
from jobs.plan import Step
from jobs.tagged import Queued
from tests.checkout import STAGES, Checkout
from utils.errors import InputError
from utils.paths import CHAIN_FILE, ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.slurm"))


@pytest.fixture
def here(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_launcher_imports_neither_torch_nor_what_draws() -> None:
    modules = "jobs.launch, ssl_train.config, detect_train.config, evaluate.config"
    code = f"import sys, {modules}; print({{'torch', 'rich'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_chain_runs_in_order_and_the_second_time_not_at_all(here: Checkout) -> None:
    first = here.local("--chain")
    assert first.returncode == 0, first.stdout
    assert here.made("eval") == "pretrain:0.015 r1:0.03 r2:0.003 r3:0.0003 eval:0.03"
    assert f"eval report: {here.root}/runs/standin/eval/report.txt" in first.stdout
    assert first.stdout.endswith(" Average Precision  (AP) @[ all ] = 0.500\n")
    markers = {stage: here.state(stage) for stage in STAGES}
    second = here.local("--chain", "workers=2")
    assert second.returncode == 0
    assert [f"{stage}: done already, skipped" in second.stdout for stage in STAGES] == [True] * 5
    assert {stage: here.state(stage) for stage in STAGES} == markers


def test_from_does_a_stage_and_what_depends_on_it_again_and_deletes_nothing(here: Checkout) -> None:
    here.local("--chain")
    before = here.state("r1")
    again = here.local("--from", "r2", "r2.optim.lr=0.5")
    assert again.returncode == 0, again.stdout
    assert here.made("eval") == "pretrain:0.015 r1:0.03 r2:0.5 r3:0.0003 eval:0.03"
    assert (here.root / "runs/standin/eval.1/last.txt").read_text().split()[2] == "r2:0.003"
    assert here.state("r1") == before
    assert not (here.root / "runs/standin/r1.1").exists()


def test_what_failed_half_way_does_not_go_on_from_an_older_parent(here: Checkout) -> None:
    here.local("--chain", "r2.fail=error")
    assert here.local("--from", "r1", "r1.optim.lr=0.5").returncode == 0
    assert here.made("r2") == "pretrain:0.015 r1:0.5 r2:0.003"
    assert (here.root / "runs/standin/r2.1/state.json").exists()


def test_what_was_made_from_an_older_stage_is_done_again(here: Checkout) -> None:
    here.local("--chain")
    assert here.local("--only", "r1", "optim.lr=0.5").returncode == 0
    table = here.table()
    assert [table[stage].split()[1] for stage in STAGES] == ["DONE", "DONE", "STALE", "STALE", "STALE"]
    refused = here.local("--only", "eval")
    assert (refused.returncode, "eval: needs r3, which is stale" in refused.stdout) == (2, True)
    assert here.local("--chain", "r1.optim.lr=0.5").returncode == 0
    assert here.made("eval") == "pretrain:0.015 r1:0.5 r2:0.003 r3:0.0003 eval:0.03"


def test_a_failure_stops_the_chain_and_the_next_launch_starts_there(here: Checkout) -> None:
    failed = here.local("--chain", "r1.fail=error")
    assert failed.returncode == 1
    log = here.state("r1")["log"]
    assert failed.stdout.endswith(f"ERROR 1: r1 failed: RuntimeError: the disk is on fire (log: {log})\n")
    assert not (here.root / "runs/standin/r2").exists()
    line = here.table()["r1"]
    assert line.split()[1] == "FAILED"
    assert line.endswith(f"RuntimeError: the disk is on fire  {Path(log).relative_to(here.root)}")
    pretrain = here.state("pretrain")
    assert here.local("--chain").returncode == 0
    assert here.state("pretrain") == pretrain
    assert here.state("eval")["status"] == "done"


def test_a_stage_that_is_killed_is_marked_by_the_launcher(here: Checkout) -> None:
    killed = here.local("--chain", "r1.fail=kill")
    cause = "its process was killed by signal 9, SIGKILL (out of memory?)"
    assert (killed.returncode, f"r1 failed: {cause}" in killed.stdout) == (1, True)
    assert (here.state("r1")["status"], here.state("r1")["cause"]) == ("failed", cause)


def test_status_sees_that_a_running_process_is_gone(here: Checkout) -> None:
    assert here.worker("pretrain", "fail=kill").returncode == -9
    assert here.state("pretrain")["status"] == "running"
    assert here.table()["pretrain"].split()[1:3] == ["FAILED", "(gone)"]


def test_another_configuration_is_refused_not_ignored(here: Checkout) -> None:
    here.local("--chain")
    refused = here.local("--chain", "r2.optim.lr=0.5")
    assert refused.returncode == 2
    assert "r2 of chain standin is done with another configuration: optim.lr 0.003 -> 0.5" in refused.stdout
    assert here.local("--chain", "r2.optim.lr=0.5", "--name", "other").returncode == 0


def test_a_dry_run_shows_the_commands_and_changes_nothing(here: Checkout) -> None:
    here.local("--only", "pretrain")
    before = here.files()
    shown = here.local("--chain", "--dry-run", "--ranks", "2", "r1.optim.lr=0.5")
    assert shown.returncode == 0
    assert "# pretrain: done already, skipped" in shown.stdout
    worker = f"-m jobs.worker r1 --file={here.root}/tests/standin/chain.yaml --name=standin optim.lr=0.5\n"
    assert f"-m torch.distributed.run --standalone --nproc-per-node=2 {worker}" in shown.stdout
    assert here.files() == before


def test_every_problem_is_told_before_anything_starts(here: Checkout) -> None:
    (here.root / "cut.sqsh").write_bytes(b"hsqs")
    (here.root / "mine_0001.pth").touch()
    words = [
        "data.labeled=cut.sqsh",
        "pretrain.data.labeled=none",
        "r1.backbone=mine_0002.pth",
        "r3.epochs=0",
    ]
    refused = here.local("--chain", "--ranks", "3", *words)
    assert refused.returncode == 2
    for problem in (
        "  pretrain: batch_size=128 cannot be split over 3 ranks",
        "  pretrain: data.labeled: none: cannot be opened",
        "  r1: data.labeled: cut.sqsh: not a squashfs archive",
        "  r1: backbone=mine_0002.pth: no such file; there are mine_0001.pth",
        "  r3: epochs=0: at least 1",
    ):
        assert problem in refused.stdout
    assert here.files() == set()


def test_two_ranks_here_are_torchrun(here: Checkout) -> None:
    done = here.local("--only", "pretrain", "--ranks", "2", "ranks=meet")
    assert done.returncode == 0, done.stdout
    assert '"size": 2' in (here.root / "runs/standin/pretrain/ranks.json").read_text()


def test_ranks_on_xla_are_refused_not_ignored(here: Checkout) -> None:
    """It has one for each chip."""
    config = here.root / "tests/standin/config.py"
    config.write_text(config.read_text().replace("workers: int = 0", 'workers: int = 0\n    device: str = "cpu"'))
    for words in (["r1.device=xla"], ["--device", "xla"], ["r1.device=xla", "--dry-run"]):
        refused = here.local("--chain", "--ranks", "2", *words)
        assert refused.returncode == 2
        assert re.search(r"ERROR 2: (r1|pretrain): --ranks 2: device=xla has a rank for each chip", refused.stdout)
    assert not (here.root / "runs/standin/pretrain").exists()
    shown = here.local("--chain", "--dry-run", "--device", "xla")
    assert (shown.returncode, "-m utils.xla_run -m jobs.worker r1 " in shown.stdout) == (0, True)


def test_the_launcher_may_be_called_from_anywhere(here: Checkout, tmp_path: Path) -> None:
    (here.root / "data/training/images").mkdir(parents=True)
    words = ["--file", f"{here.root}/tests/standin/chain.yaml", "--cluster", "local", "data.labeled=data"]
    command = [sys.executable, f"{here.root}/jobs/launch.py", "--only", "pretrain", *words]
    done = subprocess.run(command, cwd=tmp_path, env=here.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert here.state("pretrain")["status"] == "done"


def test_debug_runs_the_stages_in_the_launcher(here: Checkout) -> None:
    done = here.launch("--chain", "--cluster", "debug")
    assert done.returncode == 0, done.stdout
    assert len({here.state(stage)["job_id"] for stage in STAGES}) == 1
    refused = here.launch("--chain", "--cluster", "debug", "--ranks", "2")
    assert (refused.returncode, "debug is one process" in refused.stdout) == (2, True)


def test_two_launchers_of_one_chain_do_not_meet(here: Checkout) -> None:
    words = [sys.executable, "jobs/launch.py", "--file", "tests/standin/chain.yaml", "--cluster", "local"]
    with here.start(*words, "--chain", "pretrain.wait_for=go") as first:
        while not (here.root / "runs/standin/pretrain/state.json").exists():
            assert first.poll() is None
        second = here.local("--chain")
        assert (second.returncode, f"at work on standin: process {first.pid} on " in second.stdout) == (2, True)
        assert here.local("--only", "pretrain", "--name", "other").returncode == 0
        (here.root / "go").touch()
        first.communicate()
    assert first.returncode == 0


def test_ctrl_c_ends_a_local_launch_with_one_line(here: Checkout) -> None:
    words = [sys.executable, "jobs/launch.py", "--file", "tests/standin/chain.yaml", "--cluster", "local"]
    # setsid: Ctrl-C of a terminal goes to all processes of its group; a background shell has its children ignore it
    words = ["setsid", "env", "--default-signal=INT", *words]
    with here.start(*words, "--chain", "pretrain.wait_for=go") as launcher:
        while not (here.root / "runs/standin/pretrain/state.json").exists():
            assert launcher.poll() is None
        os.killpg(launcher.pid, signal.SIGINT)
        output, _ = launcher.communicate(timeout=60)
    assert (launcher.returncode, "Traceback" in output) == (130, False)
    assert "interrupted; the same command goes on from there\n" in output
    assert here.state("pretrain")["cause"] == "KeyboardInterrupt: KeyboardInterrupt"
    assert here.local("--only", "pretrain").returncode == 0


def test_a_chain_that_was_not_launched_names_those_that_were(here: Checkout) -> None:
    assert "nothing was launched as standin yet; --name shows another: none\n" in here.launch("--status").stdout
    assert here.local("--only", "pretrain", "--name", "mine").returncode == 0
    assert here.launch("--status").stdout.endswith(": mine\n")
    assert "nothing was launched" not in here.launch("--status", "--name", "mine").stdout


def test_ctrl_c_ends_a_watch_and_what_is_done_is_watched_and_logged(here: Checkout) -> None:
    words = [sys.executable, "jobs/launch.py", "--file", "tests/standin/chain.yaml"]
    with here.start("env", "--default-signal=INT", *words, "--watch") as watching:
        assert watching.stdout
        while "eval" not in watching.stdout.readline():
            assert watching.poll() is None
        watching.send_signal(signal.SIGINT)
        output, _ = watching.communicate(timeout=60)
    assert (watching.returncode, "Traceback" in output) == (130, False)
    assert here.local("--chain").returncode == 0
    watched = here.launch("--watch")
    assert (watched.returncode, watched.stdout.count(" DONE ")) == (0, 5), watched.stdout
    logged = here.launch("--logs", "r2", "-f")
    assert (logged.returncode, logged.stdout.splitlines()[0]) == (0, f"==> {here.state('r2')['log']} <==")
    assert "made pretrain:0.015 r1:0.03 r2:0.003" in logged.stdout and "r2 is done" in logged.stdout.splitlines()[-1]


@pytest.mark.parametrize(("ranks", "asked"), [(1, "stage"), (2, "launcher")])
def test_a_stage_that_is_asked_to_end_ends_the_launch_and_the_next_one_goes_on(
    here: Checkout, ranks: int, asked: str
) -> None:
    words = [sys.executable, "jobs/launch.py", "--file", "tests/standin/chain.yaml", "--cluster", "local"]
    run_dir = here.root / "runs/standin/pretrain"
    with here.start(*words, "--chain", "pretrain.wait_for=go", "--ranks", ranks) as launcher:
        while sum("listening" in log.read_text() for log in run_dir.glob("logs/*.log")) < ranks:
            assert launcher.poll() is None
        pid, number = {
            "stage": (int(here.state("pretrain")["job_id"]), signal.SIGUSR2),
            "launcher": (launcher.pid, signal.SIGTERM),
        }[asked]
        os.kill(pid, number)
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, output
    assert output.endswith(f"pretrain: stopped by {number.name} after step 1\n")
    assert not (here.root / "runs/standin/r1").exists()
    assert here.table()["pretrain"].split()[1] == "PREEMPTED"
    (here.root / "go").touch()
    assert here.local("--chain", "pretrain.wait_for=go").returncode == 0
    assert here.state("pretrain")["begins"] == "checkpoint_0000_00000001.pth"
    assert here.state("eval")["status"] == "done"


@pytest.mark.parametrize("words", [["--status"], ["--watch"], ["--chain", "--cluster", "local", "--dry-run"]])
def test_a_reader_that_has_gone_is_no_error(here: Checkout, words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "jobs/launch.py", "--file", "tests/standin/chain.yaml", *words]
    done = subprocess.run(
        command, cwd=here.root, env=here.environ, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--from", "r9"],
        ["--chain", "--sbatch=--mem=1G"],
        ["--cancel", "--chian"],
        ["--status", "--watch", "--all"],
        ["--status", "-f"],
        ["--logs", "r1"],
        ["--logs", "r1", "--watch"],
        ["--status", "standin"],
        ["--cancel", "name=standin"],
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(here: Checkout, words: list[str]) -> None:
    assert here.local(*words).returncode == 2
    assert here.files() == set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_shipped_script_is_bash_and_its_header_is_read_whole(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    options = submit.header(script)
    written = [f"#SBATCH --{key}" + ("" if value is True else f"={value}") for key, value in options.items()]
    assert written == lines
    assert options["output"] == "runs/%x_%j.out"
    if script.stem != "chain":
        assert options["job-name"] == script.stem
        assert (options["requeue"], options["signal"]) == (True, "USR2@120")
        assert (options["open-mode"], options["kill-on-invalid-dep"]) == ("append", "yes")
        assert options["ntasks-per-node"] == options["gpus-per-node"]  # one task a GPU


@pytest.mark.parametrize("name", ["common.sh", "site.sh"])
def test_the_shared_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / "slurm" / name], check=True)


def test_sbatch_options_as_users_write_them() -> None:
    words = ["--mem", "4G", "--exclusive", "--gres=gpu:v100:2", "--constraint=a&b"]
    expected = {"mem": "4G", "exclusive": True, "gres": "gpu:v100:2", "constraint": "a&b"}
    assert submit.options(words, "here") == expected
    for bad in (["-c", "4"], ["4G"], ["--mem=1", "2"]):
        with pytest.raises(InputError, match="write the long form"):
            submit.options(bad, "here")


def test_a_waiting_job_is_kept_only_if_it_waits_for_the_jobs_it_should() -> None:
    steps = [Step(stage, "run", [], {}, needs) for stage, needs in (("r1", []), ("r2", ["r1"]), ("r3", ["r2"]))]

    def kept(dependency: str, pending: bool = True) -> list[str]:
        live = [
            Queued("r1", "20", "", pending=True, ending=False, releasable=False, dependency="(null)"),
            Queued("r2", "12", "", pending, ending=False, releasable=False, dependency=dependency),
            Queued("r3", "13", "", pending=True, ending=False, releasable=False, dependency="afterok:12(unfulfilled)"),
        ]
        return list(enqueue.kept(steps, live))

    assert kept("afterok:20(unfulfilled)") == ["r1", "r2", "r3"]
    assert kept("afterok:11(unfulfilled)") == ["r1"]  # of an earlier launch, as r3 waits for that r2
    assert kept("(null)", pending=False) == ["r1", "r2", "r3"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--array=0-3", "array=0-3: a stage is one job"),
        ("--signal=USR2@86400", "signal=USR2@86400: needs USR2@SECONDS, and fewer than the 86400 of its time"),
        ("--signal=KILL@60", "signal=KILL@60: needs USR2@SECONDS"),
    ],
)
def test_what_a_stage_cannot_be_is_refused(option: str, message: str) -> None:
    chain = stages.load(CHAIN_FILE)
    with pytest.raises(InputError, match=message):
        submit.resources(chain, "r1", [option])


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("90", 90),
        ("1:30", 2),
        ("24:00:00", 1440),
        ("0:00:01", 1),
        ("2-0", 2880),
        ("1-2:30", 1590),
        ("1-0:0:30", 1441),
    ],
)
def test_time_limits(limit: str, minutes: int) -> None:
    assert submit.minutes(limit) == minutes
