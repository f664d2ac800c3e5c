"""GRPO's objective: the loss of a token as the loss head takes it, and a group's advantages."""
