"""A U-Net that proposes a fixed number of regions, and a ResNet that says what each one shows."""
