"""Faster R-CNN with a feature pyramid, fine-tuned in rounds."""
