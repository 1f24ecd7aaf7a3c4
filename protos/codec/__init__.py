"""Messages to and from the types of placement, for both ends of a wire."""
