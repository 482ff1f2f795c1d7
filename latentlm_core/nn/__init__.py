"""Bricks that every network shares."""
