"""The model directory: its files and its chat template."""
