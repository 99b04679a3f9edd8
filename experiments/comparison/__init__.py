"""The main job: batch sizes compared over learning rates and seeds, all runs at once."""
