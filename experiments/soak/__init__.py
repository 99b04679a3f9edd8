"""What goes wrong in weeks, in minutes: kills, faults, NaN and restarts."""
