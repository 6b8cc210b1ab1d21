"""Where a file comes from: git and DVC."""
