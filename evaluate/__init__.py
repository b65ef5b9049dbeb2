"""COCO evaluation of a detection checkpoint, and its reports."""
