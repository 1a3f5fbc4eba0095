"""The workloads of scripts/bench.py, a module for each kind. Standard library only."""
