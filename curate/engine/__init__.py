"""Where stages run: in the process, or on Ray."""
