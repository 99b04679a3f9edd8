"""One training run: its configuration, method, net, loop, checkpoints and folder."""
