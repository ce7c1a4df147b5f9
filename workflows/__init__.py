"""In which order: one workflow per loop, each reads like the paper."""
