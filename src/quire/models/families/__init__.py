"""Model families: each a function from config.json to an `Arch`, and the names of its weights. The registry takes
every module's `FAMILIES`."""
