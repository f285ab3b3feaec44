"""Rows of the learning loop: labels, images and their groups, snapshots, runs, slots of schedules, shadow scores."""
