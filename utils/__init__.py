"""What every program shares. Nothing here imports from the other packages."""
