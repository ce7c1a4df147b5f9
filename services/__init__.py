"""What stays up: gateway, trigger, console, and the embedded servers of the demo."""
