"""Model families: each a function from config.json to an `Arch`, and a table of its weights."""
