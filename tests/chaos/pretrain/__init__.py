"""ssl_train, with every step written down."""
