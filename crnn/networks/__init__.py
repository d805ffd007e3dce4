"""Networks: backbones that turn a line image into a row of features, and the recogniser."""
