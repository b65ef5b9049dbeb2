"""Stages that finish at once, to test how stages are run: see chain.yaml."""
