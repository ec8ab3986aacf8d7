"""The control plane: a manifest becomes events, events become state, state becomes a plan, a provider carries it out."""
