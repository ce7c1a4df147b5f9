"""Sensors: wait in the connector service, in no pod, until a window over the device topic closes."""
