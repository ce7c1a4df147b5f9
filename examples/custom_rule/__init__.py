"""A package with one aggregation rule, registered by entry point."""
