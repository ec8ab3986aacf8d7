"""Which version of a model a request gets: rewrites, canaries, blue and green, shadows, fallbacks."""
