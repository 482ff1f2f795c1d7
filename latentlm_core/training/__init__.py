"""One trainer, several tasks."""
