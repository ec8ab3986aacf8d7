"""How quire-tiny, the model that ships inside quire, is made: its text, its tokenizer, its training."""
