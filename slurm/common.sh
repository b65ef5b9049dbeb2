# What every job of this project does. Sourced by slurm/*.slurm and by the scripts that jobs/launch.py submits.
set -euo pipefail
trap "" USR1 USR2 TERM # not before run_stage has something to save

relay_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$relay_root"
umask 077 # logs and checkpoints are nobody else's; slurm/site.sh may widen it
source slurm/site.sh
if declare -F site_setup >/dev/null; then
    set +u # `module` reads variables that are not set
    site_setup
    set -u
fi

if [[ -z "${RELAY_PYTHON:-}" ]]; then
    RELAY_PYTHON=python3
    if [[ -x .venv/bin/python ]]; then RELAY_PYTHON="$relay_root/.venv/bin/python"; fi
fi
# shellcheck disable=SC2206  # RELAY_CONTAINER is several words
relay_python=(${RELAY_CONTAINER:-} "$RELAY_PYTHON")

export PYTHONPATH="$relay_root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not inherit it any more since Slurm 22.05

# run_stage STAGE [WORDS...]: one worker per task, and then what the stage's marker says: the job ends, or is
# requeued. The ranks find each other by a file in the run directory.
#
# USR1, USR2 and TERM ask for an end. They can reach this shell, srun and the ranks, one or all of them, and kill none:
# before a rank's program listens they are ignored; the shell hands USR1 and USR2 on.
run_stage() {
    local step code=0 signalled
    export RELAY_DEATHS="$relay_root/runs/.deaths_${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}"
    (
        trap "" USR1 USR2 TERM
        exec srun --kill-on-bad-exit=1 bash -c "$relay_rank" rank "${relay_python[@]}" -u -m jobs.worker "$@"
    ) &
    step=$!
    trap 'signalled=1; kill -s USR1 "$step" 2>/dev/null || true' USR1
    trap 'signalled=1; kill -s USR2 "$step" 2>/dev/null || true' USR2
    trap 'signalled=1' TERM
    while
        signalled=0
        wait "$step" && code=0 || code=$?
        ((signalled)) # then it may not have ended; where it has, its code is the same again
    do :; done
    trap "" USR1 USR2 TERM # nor do they end what follows
    "${relay_python[@]}" -m jobs.after "$code" "$@" && code=0 || code=$?
    if ((code == 99)); then # REQUEUE of jobs/after.py
        relay_requeue && code=0 || code=$?
    fi
    exit "$code"
}

# What a rank is: its death by a signal, which it cannot tell itself, is noted for jobs/after.py.
# shellcheck disable=SC2016  # for the rank's own shell
relay_rank='trap "" USR1 USR2 TERM
"$@"
code=$?
if ((code > 128)); then mkdir -p "$RELAY_DEATHS" && echo "$code" >"$RELAY_DEATHS/$SLURM_PROCID"; fi
exit "$code"'

# Put this job back into the queue, under the same id, unless Slurm does so itself or somebody has cancelled it.
relay_requeue() {
    local pause state said
    for pause in 1 2 4 8 16 0; do
        if state="$(squeue -h -t all -j "$SLURM_JOB_ID" -o %T 2>&1)"; then
            if [[ $state != RUNNING ]]; then
                echo "job $SLURM_JOB_ID is $state: not requeued from here"
                return 0
            fi
            if said="$(scontrol requeue "$SLURM_JOB_ID" 2>&1)"; then return 0; fi
        else
            said="$state"
        fi
        if [[ $said == *"not permitted"* || $said == *disabled* ]]; then break; fi # asking again does not help
        sleep "$pause"
    done
    echo "ERROR 75: job $SLURM_JOB_ID cannot be requeued: $said; its work is saved, submit it again to go on" >&2
    return 75
}
