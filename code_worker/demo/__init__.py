"""The demonstration: a toy image set, a toy release, and the whole main job over them."""
