"""The default policy: where a request is expected to cost least, learnt from what happens. No weights."""
