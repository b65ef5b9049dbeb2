"""What runs, in which order, where, and how far it is. Nothing here needs torch until a stage runs."""
