"""Where it runs: typed Flyte shells around one call each."""
