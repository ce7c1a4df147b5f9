"""The four loops as plain functions: one function per step, called by one task each."""
