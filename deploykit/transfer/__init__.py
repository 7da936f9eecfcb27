"""Transfer: what is done to a trained model so that it serves another task or another domain."""
