"""Media, sources, latent shards and batches."""
