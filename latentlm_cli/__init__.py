"""The command line: words in, one call of the core, words out."""
