"""The back end that is always there: plain torch, on any device, arranged so that promise P1 holds."""
