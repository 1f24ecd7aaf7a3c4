"""What a model is: its sizes, its tensors, and how both are read from config.json."""
