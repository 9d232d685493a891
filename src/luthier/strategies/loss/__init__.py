"""Another loss than the task's own, or more than it."""
