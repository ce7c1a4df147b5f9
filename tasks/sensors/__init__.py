"""Sensors and connector tasks: what waits for the outside world."""
