"""--cluster tpu: what is checked before a VM is asked for, and the gcloud commands of a chain."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jobs import preflight, tpu_config
from jobs.plan import Step
from jobs.stages import Chain
from jobs.tpu_code import Code, joined, pack, unpack
from jobs.tpu_vm import Vm, identity
from utils import config
from utils.errors import InputError
from utils.paths import ROOT
from utils.shared_config import FILE_KEYS

PYTHON = ".venv-tpu/bin/python"  # of `make install-tpu`


def check(chain: Chain, selected: Sequence[str]) -> Code:
    """The copy of the checkout that a VM gets. Raises: InputError listing what keeps the chain from running there."""
    if problems := tpu_config.missing(chain.store, chain.tpu):
        raise InputError("\n  ".join([f"{chain.file}:", *problems]))
    code = pack()
    configs = [chain.file, *(chain.stages[stage].config for stage in selected)]
    needed = [Path(origin) for file in configs for origin, _ in config.file_layers(file)]
    if outside := [str(file) for file in dict.fromkeys(needed) if _in_checkout(file) not in code.names]:
        text = "the VM gets what git lists in the checkout (tracked, or not ignored): move there"
        raise InputError(f"{text} {', '.join(outside)}")
    return code


def _in_checkout(file: Path) -> str:
    """The file's path from the checkout's root; one that leads out of it if it is elsewhere."""
    path = file.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def problems(chain: Chain, step: Step, code: Code) -> Iterator[str]:
    """Why a step would fail on a VM: what is only on this machine, then what fails anywhere."""
    stage, here = chain.stages[step.stage], []
    for key in preflight.DATA_KEYS:
        if (value := step.config.get(key)) is not None and not value.startswith("gs://"):
            here.append(f"{key}={value}: is on this machine; copy it to a bucket and give its gs:// URL")
    for key in dict.fromkeys(("data.classes", *FILE_KEYS, *stage.inputs)):
        value = step.config.get(key)
        if value in (None, "auto", "never", stage.inputs.get(key)) or value.startswith("gs://"):
            continue
        if _in_checkout(Path(value)) not in code.names:
            here.append(f"{key}={value}: is on this machine, and no file of the checkout that git lists")
    yield from here or preflight.problems(chain, step, 1)


def preparation(vm: Vm, code: Code, archive: Path) -> list[list[str]]:
    """The commands that bring the code to a VM and set it up."""
    return [vm.scp(str(archive), code.archive), vm.ssh(unpack(code))]


def stage_command(chain: Chain, code: Code, step: Step, verb: str = "run") -> str:
    """What each host of the VM runs: the stage's worker, a process for each chip, by a verb of jobs/tpu_remote.py."""
    return joined(["cd", code.folder], [*_remote(chain, verb, step.stage), *_worker(chain, step)])


def stop_command(chain: Chain, code: Code, stage: str) -> str:
    """End the stage, by whatever command it runs."""
    return joined(["cd", code.folder], _remote(chain, "stop", stage))


def _worker(chain: Chain, step: Step) -> list[str]:
    there = replace(chain, file=chain.file.relative_to(ROOT))
    return [PYTHON, "-m", "utils.xla_run", "-m", "jobs.worker", *there.worker_words(step.stage, step.words)]


def _remote(chain: Chain, verb: str, stage: str) -> list[str]:
    return ["python3", "-m", "jobs.tpu_remote", verb, identity(chain), stage]


def aside_command(chain: Chain, code: Code, stage: str) -> str:
    """Rename what a VM that was used before has of the stage; asked twice by gcloud, the second time nothing is there.

    A stage that is made anew must not find there what it made before.
    """
    folder = f"runs/{chain.name}/{stage}"
    move = f"{shlex.join(['test', '!', '-e', folder])} || {shlex.join(['mv', folder, f'{folder}.{int(time.time())}'])}"
    return f"{joined(['cd', code.folder])} && {{ {move}; }}"


def show(chain: Chain, steps: Sequence[Step], code: Code) -> None:
    """Print every gcloud command of a launch that finds no VM and is not disturbed."""
    vm, archive = Vm.of(chain), chain.dir.submitted / code.archive
    todo = [step for step in steps if step.action != "skip"]
    for step in steps:
        if step.action == "skip":
            print(f"\n# {step.stage}: done already, skipped")
    ready = [vm.create(), *vm.describe()] if vm.ours else []
    if not todo:
        return _print("left by a launcher that was killed, if at all", [*vm.describe(), vm.delete()] if vm.ours else [])
    _print(f"{vm.name}: {'created if it is not there' if vm.ours else 'used'}", [*vm.describe(), *ready])
    _print(f"{len(code.names)} files of the checkout", preparation(vm, code, archive))
    for step in todo:
        aside = [vm.ssh(aside_command(chain, code, step.stage))] if step.action == "again" else []
        words = "set aside, run again" if aside else "run"
        _print(f"{step.stage}: {words}", [*aside, vm.ssh(stage_command(chain, code, step))])
        print(f"# then {chain.url(step.stage)} is collected into {chain.run_dir(step.stage).path}")
    if vm.ours:
        _print("at the end, whatever it is", [vm.delete()])


def _print(title: str, commands: Sequence[list[str]]) -> None:
    print("\n".join([f"\n# {title}", *map(shlex.join, commands)]))
