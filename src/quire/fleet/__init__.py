"""The control plane: manifest, events, state, plan and actions, and a provider that carries them out."""
