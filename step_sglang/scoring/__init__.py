"""Scores steps from hidden states: boundary tokens, the scorer, the fused op, per-slot state."""
