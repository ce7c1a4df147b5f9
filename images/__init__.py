"""In which container: ImageSpec objects only."""
