"""The factored method: exact moments without per-example gradients in memory."""
