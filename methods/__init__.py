"""Other ways than PPO to learn from preferences, one short script each, on the same checkpoints and files."""
