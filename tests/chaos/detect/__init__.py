"""detect_train, with every step written down."""
