# What every job of this project does. Sourced by slurm/*.slurm and by the scripts that jobs/launch.py submits.
set -euo pipefail

relay_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$relay_root"
umask 077 # pickled calls and logs are nobody else's; slurm/site.sh may widen it
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

# run_stage STAGE [WORDS...]: one worker per task. The ranks find each other by a file in the run directory.
run_stage() {
    srun --kill-on-bad-exit=1 "${relay_python[@]}" -u -m jobs.worker "$@"
}
