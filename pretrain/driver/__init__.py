"""The driver of a run: starts it or goes on with it, drives it, has checkpoints evaluated, has it tracked."""
