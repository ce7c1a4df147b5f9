"""What keeps a federation from turning, found before it turns: `fednested tier1 doctor`."""
