"""The inference gateway: many model servers behind one address.

One picker stands behind two doors, quire's own HTTP proxy (`proxy/`) and Envoy's external processing protocol
(`extproc/`): parse → admit → flow control → profiles → filter → score → pick → send → record.
"""
