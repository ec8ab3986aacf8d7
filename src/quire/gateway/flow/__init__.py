"""Flow control: which request goes next when the endpoints are full, and which is turned away.

`queue` is the plain state machine, `policies` and `limits` what it decides by, `saturation` tells how full the
endpoints are, `settings` reads the configuration, and `controller` puts them behind the director's `Gate`.
"""
