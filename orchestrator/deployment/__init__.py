"""One deployment, from its checks to its end."""
