"""The first hand-over: what is wanted, understood and checked before any weight is there."""
