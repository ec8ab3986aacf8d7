"""What keeps one endpoint's trouble from becoming everybody's: ejection, health, budgets for doing things twice."""
