"""Adapters made of other adapters: sums of deltas, what task arithmetic makes of them, and their low-rank forms."""
