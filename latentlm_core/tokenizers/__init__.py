"""From media to latents and back."""
