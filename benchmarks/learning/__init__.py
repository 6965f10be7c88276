"""What the models learn, and whether they learn stably."""
