"""What the project claims, measured: one small registered function per figure in the `rows_*.py` modules."""
