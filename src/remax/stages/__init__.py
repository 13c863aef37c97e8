"""The supervised stages in front of the reinforcement learning: thin, over TRL's trainers."""
