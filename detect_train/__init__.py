"""Detectors trained on labelled images: Faster R-CNN in rounds, and two kinds whose shapes never change."""
