"""MoCo-v2 pretraining of a ResNet on unlabelled images."""
