"""The networks that generate latents and text."""
