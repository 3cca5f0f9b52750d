"""Where keys and values live, and which of them stay on the device. What needs no torch loads none."""
