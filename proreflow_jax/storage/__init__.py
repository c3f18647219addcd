"""Local and gs:// paths, files and folders that are whole or absent, locks, local copies."""
