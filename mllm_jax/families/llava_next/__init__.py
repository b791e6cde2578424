"""llava_next."""
