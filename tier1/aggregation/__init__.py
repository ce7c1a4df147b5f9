"""From device updates to a step of the experts: weigh, then fold."""
