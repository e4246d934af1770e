"""Sampling: schedule (orders, step sizes) → passes (host tables) → decode (jitted cached loop)."""
