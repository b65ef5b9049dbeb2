"""Run a chain: on Slurm where there is sbatch, else here. What is done is skipped.

    python jobs/launch.py --chain                                   # all stages
    python jobs/launch.py --chain --file jobs/demo.yaml             # another chain file
    python jobs/launch.py --from r2 r2.optim.lr=0.001               # train r2 and what depends on it again
    python jobs/launch.py --only eval data.split=training           # one stage again
    python jobs/launch.py --chain --name mine --dry-run             # show, change nothing
    python jobs/launch.py --chain --cluster tpu --file jobs/mine.yaml # on Google's TPU VMs, see jobs/tpu.yaml
    python jobs/launch.py --status --name mine                      # or --cancel; --status --all: a line a chain
    python jobs/launch.py --watch                                   # the same, kept up to date until the chain ends
    python jobs/launch.py --logs r2 -f                              # what r2 says, from its first attempt on

A word key=value goes to every selected stage that knows the key, r1.key=value to r1 alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # run as a file: the checkout belongs on the path, jobs/ does not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.arguments import parse
from utils.errors import InputError, cli

if __name__ == "__main__":
    cli(lambda: parse(__doc__))  # --help and a wrong word need nothing else

from jobs import enqueue, local, preflight, scheduler, stages, state, status, store, submit, tagged, tpu, tpu_run
from jobs.alone import alone
from jobs.logs import print_logs
from jobs.plan import Resources, Step, make, select
from jobs.scheduler import Patience
from jobs.stages import Chain
from jobs.tagged import Queued
from jobs.watch import watch
from utils.paths import ROOT, chains

INSTEAD_OF_RANKS = {
    "slurm": "on Slurm use --sbatch=--ntasks-per-node=N",
    "debug": "debug is one process, the launcher's",
    "tpu": "a TPU VM runs one on each of its chips",
}


def launch(chain: Chain, arguments: argparse.Namespace) -> None:
    """Check everything, then run or queue the selected stages. Raises: InputError listing every problem."""
    os.chdir(ROOT)  # as the stages will: relative paths in a configuration start there
    selected = select(chain, arguments.only, arguments.start)
    again = bool(arguments.only or arguments.start)
    cluster = arguments.cluster or ("slurm" if shutil.which("sbatch") else "local")
    print(f"chain {chain.name}: {', '.join(selected)} on cluster {cluster}", flush=True)
    asked: dict[str, Resources] = {}
    patience = Patience()
    if cluster == "slurm":
        scheduler.prepare_environment(submit.options(arguments.sbatch, "--sbatch"))
        asked = {stage: submit.resources(chain, stage, arguments.sbatch) for stage in selected}
    elif arguments.sbatch:
        raise InputError(f"--sbatch: the cluster is {cluster}, not slurm")
    if cluster != "local" and arguments.ranks > 1:
        raise InputError(f"--ranks is for --cluster local; {INSTEAD_OF_RANKS[cluster]}")
    code = None
    if cluster == "tpu":
        code = tpu.check(chain, selected)
    if not arguments.dry_run:
        store.refresh(chain)
    steps, problems = make(chain, selected, arguments.words, again)
    starting = [step for step in steps if step.action != "skip"]
    for step in starting:
        ranks = submit.ranks(asked[step.stage]) if asked else arguments.ranks
        found = tpu.problems(chain, step, code) if code else preflight.problems(chain, step, ranks)
        problems += [f"{step.stage}: {text}" for text in found]
    if asked:
        problems += submit.refusals(chain, {step.stage: asked[step.stage] for step in starting}, patience)
    if problems:
        raise InputError("\n  ".join(["nothing was started:", *problems]))
    if arguments.dry_run and code:
        return tpu.show(chain, steps, code)
    if arguments.dry_run:
        show(chain, steps, asked, arguments.ranks, _live(chain, steps, asked, patience))
        return
    with alone(chain, cluster):
        steps, _ = make(chain, selected, arguments.words, again)  # another launcher may have been at work
        _live(chain, steps, asked, patience)
        if asked:
            print(status.columns(enqueue.submit_all(chain, steps, asked, patience)))
        elif code:
            tpu_run.run(chain, steps, code)
            print(local.results(chain) if not again else status.table(chain))
        else:
            local.run(chain, steps, arguments.ranks, debug=cluster == "debug")
            print(local.results(chain))


def _live(chain: Chain, steps: Sequence[Step], asked: Mapping[str, Resources], patience: Patience) -> dict[str, Queued]:
    """Stage -> its job that is there and stays. Raises: InputError for one that is in the way of a step."""
    live = tagged.settled(chain, patience.call) if asked or tagged.Written.read(chain).is_used else []
    blocked = {step.stage for step in steps if step.action == "again" or (step.action == "run" and not asked)}
    if names := [f"{job.stage} (job {job.id})" for job in live if job.stage in blocked]:
        raise InputError(f"queued or running: {', '.join(names)}; wait, or --cancel first")
    keep = enqueue.kept(steps, live)
    for step in steps:
        if job := keep.get(step.stage):
            before = tagged.configuration(chain, job)
            if changed := state.differences(before or {}, step.config):
                now = "queued" if job.pending else "running"
                listed = f"{step.stage} is {now} (job {job.id}) with another configuration: {', '.join(changed)}"
                raise InputError(f"{listed}; --cancel first")
    return keep


def show(
    chain: Chain, steps: Sequence[Step], asked: Mapping[str, Resources], ranks: int, keep: Mapping[str, Queued]
) -> None:
    """Print what would be run, after what."""
    started = {step.stage for step in steps if step.action != "skip"}
    for step in steps:
        words = {"skip": "done already, skipped", "run": "run", "again": "set aside, run again"}
        if job := keep.get(step.stage):
            print(f"\n# {step.stage}: kept, job {job.id}")
            continue
        print(f"\n# {step.stage}: {words[step.action]}")
        if step.action == "skip":
            continue
        if not asked:
            print(shlex.join(local.command(chain, step, ranks)))
            continue
        after = [keep[parent].id if parent in keep else f"<{parent}>" for parent in step.needs if parent in started]
        command = submit.command(chain, step.stage, step.words)
        print(submit.script(submit.executor(chain, step.stage, asked[step.stage], after), command))


def cancel(chain: Chain) -> None:
    """Cancel the chain's jobs that are queued or running."""
    queued = tagged.queued(chain)
    if queued:
        scheduler.cancel([job.id for job in queued])
    listed = ", ".join(f"{job.stage} (job {job.id})" for job in queued)
    print(f"cancelled: {listed or 'nothing was queued or running'}")


def _others(chain: Chain) -> list[str]:
    """Of which chains there is something to see, where of this one there is nothing."""
    if chain.dir.path.exists():
        return []
    return [f"nothing was launched as {chain.name} yet; --name shows another: {', '.join(sorted(chains())) or 'none'}"]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(__doc__, argv)
    chain = stages.load(arguments.file, arguments.name, arguments.store)
    if arguments.status or arguments.logs or arguments.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    if arguments.status and arguments.all:
        print(status.overview(chain))
    elif arguments.watch:
        watch(chain)
    elif arguments.status:
        note = status.refreshed(chain)
        print(status.table(chain), *note, *_others(chain), sep="\n")
    elif arguments.logs:
        print_logs(chain, arguments.logs, arguments.follow)
    elif arguments.cancel:
        cancel(chain)
    elif arguments.chain or arguments.start or arguments.only:
        launch(chain, arguments)
    else:
        raise InputError("say what to do: --chain, --from STAGE, --only STAGE, --status, --logs STAGE or --cancel")


if __name__ == "__main__":
    try:
        cli(main)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
