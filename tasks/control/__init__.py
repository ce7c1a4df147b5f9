"""Dynamic routers: what happens after a decision."""
