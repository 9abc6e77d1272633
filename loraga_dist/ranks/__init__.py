"""Ranks: who am I, who else is there, how we leave."""
