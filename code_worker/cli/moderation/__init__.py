"""Commands of the main job: enqueue, look, scan, judge again, erase."""
