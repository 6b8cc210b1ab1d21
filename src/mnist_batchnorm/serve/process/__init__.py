"""The server's processes, their port and what they share."""
