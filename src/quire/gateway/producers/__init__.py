"""What is found out about a request before it is scheduled."""
