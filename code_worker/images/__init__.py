"""From a URI to the 224×224 pixels that are judged."""
