"""The loop: steps, ranks, checkpoints, optimizers."""
