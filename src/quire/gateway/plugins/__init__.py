"""The stock plugins, under llm-d's names."""
