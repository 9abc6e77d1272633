"""What a request will take, and what to change if that does not fit."""
