"""What reinforcement learning needs of a running engine."""
