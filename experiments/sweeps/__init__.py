"""Many runs: the plan in TOML that asks for them, and the processes that make them."""
