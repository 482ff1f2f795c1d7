"""Metrics with their protocol."""
