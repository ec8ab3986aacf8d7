"""Which endpoint holds which beginnings of prompts, and on which tier: learnt from the engines' KV events.

`subscriber` hears one engine, `index` keeps what it heard under `keys` that a prompt's tokens have too, `health` says
whether any of it works.
"""
