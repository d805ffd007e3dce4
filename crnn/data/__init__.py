"""Data: sources of text line images, their check, augmentation and batches."""
