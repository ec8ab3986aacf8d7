"""The picker behind Envoy: its external processing protocol, with the Gateway API's InferencePool semantics."""
