"""The long proof that nothing is lost: a chain of real stages on a throw-away Slurm, and faults from a seed.

    python -m tests.chaos --seed 1 --faults 40      # or: make chaos

The chain runs once undisturbed and once with processes, daemons, disks and checkpoints killed, stopped, filled and
damaged on the way. Every step's losses and the sha256 of model and optimizer after it must be the same, and so must
what the stages leave. The table that is printed says which faults there were and what became of each.
"""
