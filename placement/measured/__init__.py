"""What was measured of devices and links, and what that says."""
