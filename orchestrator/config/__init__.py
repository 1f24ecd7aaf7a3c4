"""The cluster YAML."""
