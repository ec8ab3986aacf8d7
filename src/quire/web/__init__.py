"""What every HTTP server of ours has around its routes: bounds, errors as answers, the API key, the socket."""
