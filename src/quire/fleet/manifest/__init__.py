"""Reading manifests: KServe's LLMInferenceService and what belongs to it."""
