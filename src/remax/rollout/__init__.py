"""Rollout engines: one file per engine, all behind interfaces.RolloutEngine."""
