# What differs from one cluster to the next. As it stands (all comments) it suits a cluster whose defaults do.
# `source slurm/site.sh` before a plain sbatch; jobs/launch.py and slurm/chain.slurm read it by themselves.

# export SBATCH_ACCOUNT=my_account
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal

# Node-local disk for unpacked archives, where the site sets no SLURM_TMPDIR (default: the chain's own directory).
# export RELAY_SCRATCH="/tmp/$USER"

# The Python that has the dependencies (default: .venv/bin/python of this checkout, else python3).
# export RELAY_PYTHON=/ext3/miniconda3/bin/python

# Words put before it, such as a container with a read-only overlay.
# export RELAY_CONTAINER="apptainer exec --nv --overlay $SCRATCH/relay.ext3:ro --bind $SCRATCH $SCRATCH/cuda.sif"
# export RELAY_CONTAINER="singularity exec --nv --overlay $SCRATCH/relay.ext3:ro $SCRATCH/cuda.sif"

# An address of rank 0's node that the others reach (default: the one Slurm launches from).
# export MASTER_ADDR="$(hostname -I | cut -d' ' -f1)"

# Called in the job, not on the login node.
# site_setup() {
#     module purge
#     module load python/3.11 cuda/12.4
# }
