"""What joins procrastinate_stalled to frameworks."""
