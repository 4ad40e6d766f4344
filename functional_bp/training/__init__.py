"""Training: the loop, its batches, history, checkpoints and files, and K-FAC."""
